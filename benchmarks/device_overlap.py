"""How near is a step on several devices to the one that is simulated, copies between devices included?

Run: python -m benchmarks.device_overlap [--stages 2 4 8] [--copies 0 4] [--rounds 3] [--name device_overlap]

On simulated accelerators, whose kernels and copies take the seconds they are given: any machine gives the same table,
as long as it launches faster than that.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.device_parts.overlap import Case, cases, measured
from benchmarks.harness import Result, Samples, report
from gpipe.testing import accelerators

QUESTION = "How near is a step on several devices to the one that is simulated, copies between devices included?"

NOTE = (
    "Every stage has a simulated accelerator of its own. A forward of the longest stage takes 20 ms, the input's "
    "gradient 20 ms and the weight's 20 ms; uneven stages take 0.5 to 1 of that. Copies between two devices have the "
    "two-way barrier of CUDA's; they arrive so many ms after they left. Simulated: gpipe.simulate with the same costs "
    "and links. Medians of the rounds, the host's own time included."
)


def row(case: Case, seconds: Sequence[float]) -> list[str]:
    """One line of the table."""
    found, simulated = statistics.median(seconds), case.simulated()
    return [
        f"{case.stages}",
        f"{case.micro_batches}",
        "even" if case.even else "uneven",
        case.schedule,
        f"{1e3 * case.copy:g}",
        f"{1e3 * simulated:.0f}",
        f"{1e3 * found:.0f}",
        f"{found / simulated:.3f}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, measure, report."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.device_overlap", description=QUESTION)
    options.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8])
    options.add_argument("--copies", type=float, nargs="+", default=[0.0, 4.0], help="milliseconds of a copy")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--name", default="device_overlap", help="of the files of results")
    given = options.parse_args(argv)
    if not accelerators.started():
        accelerators.start(max(given.stages))
    found = {case: measured(case, given.rounds) for case in cases(given.stages, [1e-3 * c for c in given.copies])}
    columns = ["K", "M", "stages", "schedule", "copy ms", "simulated ms", "measured ms", "over simulated"]
    rows = [row(case, seconds) for case, seconds in found.items()]
    samples = {
        ", ".join(line[:5]): Samples(seconds, [0.0] * len(seconds))
        for line, seconds in zip(rows, found.values(), strict=True)
    }
    report(given.name, [Result("A step on simulated accelerators over gpipe.simulate", columns, rows, NOTE)], samples)


if __name__ == "__main__":
    main()
