"""What does each schedule gain, and does the simulator say so?

Run: python -m benchmarks.schedules [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter, sleep
from typing import Any

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.harness import RESULTS, Result, Samples, interleave, report, steady, timed
from gpipe import Schedule, StageCost, Timeline, schedules, simulate
from gpipe.costs import divided_costs, measured_costs
from gpipe.partitioning.profile import profile

QUESTION = "What does each schedule gain, and does the simulator say so?"

STAGES = 2
WIDTH, LAYERS, SEQUENCE, BATCH = 512, 8, 128, 32
NAMES = ("gpipe", "gpipe_zero_bubble", "one_f_one_b", "zero_bubble_h1")
CHUNKS = (2, 4, 8, 16)


def built(name: str, stages: int, micro_batches: int, keep: int | None = None) -> Schedule:
    """A schedule by name; ``keep=None`` recomputes nothing."""
    schedule = schedules.builder(name)(stages=stages, micro_batches=micro_batches)
    return schedule if keep is None else schedules.with_recompute(schedule, keep)


# --- simulated --------------------------------------------------------------------------------------------------------


def simulated() -> Result:
    """Bubble and activations of every builder, equal stages."""
    cost = StageCost(1.0, 1.0, 1.0, activation_bytes=1)
    rows = []
    for stages, micro_batches in ((4, 8), (8, 32)):
        for name in schedules.BUILDERS:
            for keep in (None, 1):
                schedule = built(name, stages, micro_batches, keep)
                timeline = simulate(schedule, cost)
                rows.append(
                    [
                        f"{name}, {'nothing recomputed' if keep is None else 'keep=1'}",
                        f"{stages}, {len(schedule.workers)}, {micro_batches}",
                        f"{timeline.makespan:g}",
                        f"{100 * timeline.bubble:.1f} %",
                        f"{max(timeline.recompute):.3f}",
                        " ".join(map(str, timeline.peak_bytes)),
                    ]
                )
    columns = ["schedule", "stages, workers, M", "makespan", "bubble", "recompute share", "activations per stage"]
    note = (
        "F = I = W = 1 and one activation a micro-batch on every stage. Interleaved: two stages on each of half as "
        "many workers, so its makespan is to be compared with twice as much work a worker."
    )
    return Result("Simulated schedules, equal stages", columns, rows, note)


def large() -> tuple[Result, dict[str, Samples]]:
    """Time and memory of a large simulation."""
    rows, samples = [], {}
    for name in ("gpipe", "one_f_one_b", "zero_bubble_h1"):
        start = perf_counter()
        timeline = simulate(built(name, 1024, 4096), StageCost(1.0, 1.0, 1.0, 1, 1, 1))
        samples[f"simulate {name}"] = Samples([perf_counter() - start], [0.0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append([name, f"{perf_counter() - start:.1f}", f"{peak:.2f}", f"{100 * timeline.bubble:.2f} %"])
    columns = ["schedule", "seconds", "peak of the process so far, GiB", "bubble"]
    return Result("Building and simulating 1,024 stages x 4,096 micro-batches", columns, rows), samples


# --- cells that sleep -------------------------------------------------------------------------------------------------


class _Slow(torch.autograd.Function):
    """The same value; sleeps on the way there and on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        sleep(ctx.seconds)
        return gradients[0], None, None


class Sleeper(nn.Module):
    """A cell that sleeps through forward, input gradient and weight gradient, each for its own time."""

    def __init__(self, cost: StageCost) -> None:
        super().__init__()
        self.cost, self.weight = cost, nn.Parameter(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of two numbers."""
        slow_x = _Slow.apply(x, self.cost.forward_seconds, self.cost.input_gradient_seconds)
        product: Tensor = slow_x @ _Slow.apply(self.weight, 0.0, self.cost.weight_gradient_seconds)
        return product


def sleeping() -> Result:
    """Every action's start, simulated and run."""
    costs = [StageCost(0.02, 0.02, 0.02), StageCost(0.03, 0.02, 0.04), StageCost(0.02, 0.03, 0.02)]
    x = torch.ones(8, 2, requires_grad=True)
    rows = []
    for name in NAMES:
        for keep in (None, 0, 2):
            schedule = built(name, 3, 8, keep)
            pipe = gpipe.GPipe(nn.Sequential(*map(Sleeper, costs)), [1, 1, 1], devices=["cpu"] * 3, chunks=8)
            pipe.train_step(x, None, lambda y, _: y.mean(), "micro_batch", schedule=schedule)
            with gpipe.record(pipe) as measured:
                pipe.train_step(x, None, lambda y, _: y.mean(), "micro_batch", schedule=schedule)
            predicted = simulate(schedule, costs)
            rows.append(
                [
                    f"{name}, {'nothing recomputed' if keep is None else f'keep={keep}'}",
                    f"{predicted.makespan:.3f}",
                    f"{measured.makespan:.3f}",
                    f"{100 * _furthest(predicted, measured):.2f} %",
                ]
            )
    columns = ["schedule", "simulated s", "run s", "furthest start, of the makespan"]
    return Result("Three stages of cells that sleep, M = 8: where actions start", columns, rows)


def _furthest(predicted: Timeline, measured: Timeline) -> float:
    """The largest difference of an action's start, as a share of the makespan."""
    pairs = zip(predicted.workers, measured.workers, strict=True)
    return max(
        abs((p.start - predicted.start) - (m.start - measured.start)) / predicted.makespan
        for predicted_spans, measured_spans in pairs
        for p, m in zip(predicted_spans, measured_spans, strict=True)
    )


# --- training ---------------------------------------------------------------------------------------------------------


def layers() -> nn.Sequential:
    """The layers of ``benchmarks.throughput``."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS))
    )


def _pipe(chunks: int) -> gpipe.GPipe:
    torch.set_num_threads(STAGES)
    pipe = gpipe.GPipe(layers(), [LAYERS // STAGES] * STAGES, devices=["cpu"] * STAGES, chunks=chunks)
    torch.set_num_threads(1)
    return pipe


def _step(pipe: gpipe.GPipe, x: Tensor, y: Tensor, schedule: Schedule) -> None:
    pipe.zero_grad()
    pipe.train_step(x, y, nn.functional.mse_loss, "micro_batch", schedule=schedule)


def training(rounds: int, chunks: Sequence[int]) -> tuple[list[Result], dict[str, Samples]]:
    """Steps of every schedule in two stages, beside the simulator's word."""
    x, y = torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(BATCH, SEQUENCE, WIDTH)
    samples: dict[str, Samples] = {}
    rows = []
    for m in chunks:
        pipe = _pipe(m)
        contenders: dict[str, Callable[[], float]] = {}
        for keep in (None, 0):
            for name in NAMES:
                label = f"{name}, M={m}, {'nothing recomputed' if keep is None else 'all recomputed'}"
                contenders[label] = timed(partial(_step, pipe, x, y, built(name, STAGES, m, keep)))
        found = interleave(contenders, rounds)
        costs = _costs(pipe, x, y, m)
        for keep, words in ((None, "nothing recomputed"), (0, "all recomputed")):
            base = found[f"gpipe, M={m}, {words}"].median
            alone = simulate(built("gpipe", STAGES, m, keep), costs).makespan
            for name in NAMES:
                seconds = found[f"{name}, M={m}, {words}"].median
                predicted = simulate(built(name, STAGES, m, keep), costs).makespan
                ideal = simulate(built(name, STAGES, m, keep), StageCost(1.0, 1.0, 1.0)).makespan
                best = simulate(built("gpipe", STAGES, m, keep), StageCost(1.0, 1.0, 1.0)).makespan
                rows.append(
                    [
                        str(m),
                        words,
                        name,
                        f"{seconds:.3f}",
                        f"{predicted:.3f}",
                        f"{base / seconds:.3f}",
                        f"{alone / predicted:.3f}",
                        f"{best / ideal:.3f}",
                    ]
                )
        samples |= found
    columns = "M|recompute|schedule|step s|simulated s|over gpipe|the same, simulated|the same, F = I = W".split("|")
    title = (
        f"{LAYERS} Transformer layers, d {WIDTH}, sequence {SEQUENCE}, batch {BATCH}, {STAGES} stages on two cores, "
        "one intra-op thread a stage"
    )
    note = "Simulated from the medians of F, I and W in recorded zero_bubble_h1 steps; the optimizer is not in a step."
    return [Result(title, columns, rows, note)], samples


def _costs(pipe: gpipe.GPipe, x: Tensor, y: Tensor, chunks: int) -> list[StageCost]:
    """Medians over a few recorded steps."""
    schedule = built("zero_bubble_h1", STAGES, chunks)
    found = []
    for _ in range(3):
        with gpipe.record(pipe) as timeline:
            _step(pipe, x, y, schedule)
        found.append(measured_costs(timeline))
    return [
        StageCost(
            statistics.median(c.forward_seconds for c in stage),
            statistics.median(c.input_gradient_seconds for c in stage),
            statistics.median(c.weight_gradient_seconds for c in stage),
        )
        for stage in zip(*found, strict=True)
    ]


def from_profile(rounds: int) -> tuple[Result, dict[str, Samples]]:
    """Makespans simulated from ``profile``, whose cells never ran in a pipeline."""
    x, y = torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(BATCH, SEQUENCE, WIDTH)
    module = layers()
    rows, contenders, predicted = [], {}, {}
    spans: dict[str, list[float]] = {}

    def recorded(name: str, pipe: gpipe.GPipe, schedule: Schedule) -> None:
        with gpipe.record(pipe) as timeline:
            _step(pipe, x, y, schedule)
        spans.setdefault(name, []).append(timeline.makespan)

    for m in (4, 8):
        torch.set_num_threads(1)
        costs = divided_costs(profile(module, x, chunks=m, company=STAGES - 1), [LAYERS // STAGES] * STAGES)
        pipe = _pipe(m)
        for name in ("gpipe", "one_f_one_b"):
            label = f"{name}, M={m}"
            schedule = built(name, STAGES, m)
            predicted[label] = simulate(schedule, costs).makespan
            contenders[label] = steady(partial(recorded, label, pipe, schedule))
    samples = interleave(contenders, rounds)
    for label, seconds in predicted.items():
        measured = statistics.median(spans[label][3::2])  # the second of each pair, without the round of warm-up
        rows.append([label, f"{seconds:.3f}", f"{measured:.3f}", f"{100 * (seconds / measured - 1):+.1f} %"])
    columns = ["schedule", "simulated from profile, s", "makespan recorded, s", "simulated / recorded - 1"]
    return Result("Makespans from profiled costs, the same layers, nothing recomputed", columns, rows), samples


def bytes_of_stages() -> Result:
    """Peak bytes of every stage, simulated and counted."""
    m, rows = 8, []
    x, y = torch.randn(BATCH // 2, SEQUENCE, WIDTH // 2), torch.randn(BATCH // 2, SEQUENCE, WIDTH // 2)
    module = nn.Sequential(
        *(nn.TransformerEncoderLayer(WIDTH // 2, 8, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS))
    )
    costs = divided_costs(profile(module, x, chunks=m, repeats=1), [LAYERS // STAGES] * STAGES)
    pipe = gpipe.GPipe(module, [LAYERS // STAGES] * STAGES, devices=["cpu"] * STAGES, chunks=m)
    for name in NAMES:
        for keep in (None, 0, 2):
            schedule = built(name, STAGES, m, keep)
            pipe.zero_grad()
            with gpipe.record(pipe, memory=True) as measured:
                pipe.train_step(x, y, nn.functional.mse_loss, "micro_batch", schedule=schedule)
            predicted = simulate(schedule, costs, input_bytes=x.nbytes // m, static_bytes_per_param=2.0)
            for k in range(STAGES):
                p, q = predicted.peak_bytes[k], measured.peak_bytes[k]
                rows.append(
                    [
                        f"{name}, {'nothing recomputed' if keep is None else f'keep={keep}'}, stage {k}",
                        f"{p / 2**20:.1f}",
                        f"{q / 2**20:.1f}",
                        f"{100 * (p / q - 1):+.1f} %",
                    ]
                )
    columns = ["schedule", "simulated MiB", "counted MiB", "simulated / counted - 1"]
    note = "Parameters and gradients, no optimizer state. Counted: storages, boundaries copied as if stages lay apart."
    return Result("Peak bytes of every stage", columns, rows, note)


def draw() -> None:
    """A figure: zero_bubble_h1 as simulated above, as run below."""
    m = 4
    x, y = torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(BATCH, SEQUENCE, WIDTH)
    pipe = _pipe(m)
    schedule = built("zero_bubble_h1", STAGES, m)
    _step(pipe, x, y, schedule)
    with gpipe.record(pipe) as measured:
        _step(pipe, x, y, schedule)
    predicted = simulate(schedule, _costs(pipe, x, y, m))
    figure = predicted.figure(measured, title="zero_bubble_h1, two stages on two cores, four micro-batches")
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "schedules.png", dpi=110)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, samples = training(arguments.rounds, arguments.chunks)
    profiled, more = from_profile(arguments.rounds)
    big, times = large()
    draw()
    report("schedules", [*steps, profiled, sleeping(), simulated(), bytes_of_stages(), big], samples | more | times)


if __name__ == "__main__":
    main()
