"""Does a step of two ranks on hosts far apart take the seconds that the simulator says?

Run: python -m benchmarks.hosts_apart [--rounds 5] [--chunks 4 8]     (as root: it makes network namespaces)
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import gpipe
from benchmarks.contenders import STAGES
from benchmarks.distributed import Ranks, Step, piped
from benchmarks.harness import Result, interleave, own_process, report
from benchmarks.models import BATCH, SEQUENCE, WIDTH, data
from benchmarks.namespaces import two_hosts
from gpipe.costs import measured_costs
from gpipe.schedules import BUILDERS

QUESTION = "Does a step of two ranks on hosts far apart take the seconds that the simulator says?"

DELAY, BANDWIDTH = 0.02, 100e6 / 8  # seconds, bytes per second
LAYERS = 4
SCHEDULES = ("gpipe", "one_f_one_b")


def _step(rank: int, schedule: str, chunks: int) -> Step:
    """A training step that gives what this rank's stage cost."""
    pipe = piped(LAYERS, chunks, schedule)
    x, y = data()

    def step() -> Any:
        pipe.zero_grad()
        pipe.train_step(x, y)
        return measured_costs(pipe.timeline)[0]

    return step


class Contender:
    """A schedule with M micro-batches: seconds of its steps, and what the simulator says of each."""

    def __init__(self, ranks: Ranks, schedule: str, chunks: int) -> None:
        self._run = partial(ranks.run, schedule, chunks)
        self._schedule = BUILDERS[schedule](STAGES, chunks)
        self._boundary = BATCH // chunks * SEQUENCE * WIDTH * 4
        self.predicted: list[float] = []
        self.without_link: list[float] = []

    def __call__(self) -> float:
        """Seconds on the rank of the first stage, where a step begins and ends."""
        (seconds, first), (_, last) = self._run()
        costs = [
            gpipe.StageCost(c.forward_seconds, c.input_gradient_seconds, 0.0, boundary_bytes=self._boundary)
            for c in (first, last)
        ]
        self.predicted.append(gpipe.simulate(self._schedule, costs, (DELAY, BANDWIDTH)).makespan)
        self.without_link.append(gpipe.simulate(self._schedule, costs).makespan)
        return float(seconds)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=[4, 8])
    given = parser.parse_args()
    with two_hosts(DELAY, BANDWIDTH) as network:
        for process in network.processes:
            own_process(process)
        ranks = Ranks(_step, network.hosts)
        try:
            contenders: dict[str, Callable[[], float]] = {
                f"{schedule}, M={m}": Contender(ranks, schedule, m) for m in given.chunks for schedule in SCHEDULES
            }
            samples = interleave(contenders, given.rounds)
        finally:
            ranks.close()
    rows = []
    for name, contender in contenders.items():
        assert isinstance(contender, Contender)
        predicted, alone = (statistics.median(s[1:]) for s in (contender.predicted, contender.without_link))
        measured = samples[name].median
        error = f"{100 * (predicted / measured - 1):+.1f} %"
        rows.append([name, f"{alone:.3f}", f"{predicted:.3f}", f"{measured:.3f}", error])
    columns = ["schedule", "simulated without a link, s", "simulated, s", "step, s", "simulated / step - 1"]
    title = (
        f"{LAYERS} Transformer layers, d {WIDTH}, sequence {SEQUENCE}, batch {BATCH}; two ranks on gloo in two network "
        f"namespaces, {DELAY * 1e3:.0f} ms and {BANDWIDTH * 8 / 1e6:.0f} Mbit/s apart"
    )
    note = (
        f"The link: {network.link}. Simulated from each step's own medians of F and B; medians over the steps. The "
        "first round is warm-up."
    )
    report("hosts_apart", [Result(title, columns, rows, note)], samples)


if __name__ == "__main__":
    main()
