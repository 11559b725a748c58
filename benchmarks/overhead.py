"""K = 1 beside plain PyTorch: what wrapping costs for tiny cells, where it goes, and when it no longer matters.

Run: python -m benchmarks.overhead [--rounds 21] [--steps 50]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gpipe
from benchmarks.harness import Result, Samples, interleave, ratio, report

QUESTION = "What does wrapping cost without any parallelism (K = 1), for cells of microseconds to milliseconds?"
CELLS, CHUNKS = 4, 8


@dataclass(frozen=True)
class Size:
    """What one cell, a linear layer, computes for one micro-batch."""

    width: int
    rows: int
    chunks: int = CHUNKS
    cells: int = CELLS

    def __str__(self) -> str:
        return f"{self.cells} x Linear({self.width}), {self.rows} rows, M={self.chunks}"


SIZES = (
    Size(16, 2, chunks=1, cells=1),
    Size(16, 2, chunks=8, cells=1),
    Size(16, 2, chunks=32, cells=1),
    Size(16, 2),
    Size(128, 64),
    Size(512, 128),
    Size(512, 512),
    Size(1024, 384, chunks=4, cells=2),
)
Step = Callable[[], Any]


def steps(size: Size) -> dict[str, tuple[Step, Step]]:
    """Per way to train, a step of plain PyTorch on the same micro-batches, and one of a pipe of one stage."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(size.width, size.width) for _ in range(size.cells)))
    x = torch.randn(size.chunks * size.rows, size.width)
    pipe = gpipe.GPipe(module, [size.cells], devices=["cpu"], chunks=size.chunks, checkpoint="never")

    def plain_whole() -> None:
        module.zero_grad()
        _loss(torch.cat([module(part) for part in x.chunk(size.chunks)])).backward()  # type: ignore[no-untyped-call]

    def piped_whole() -> None:
        module.zero_grad()
        _loss(pipe(x)).backward()  # type: ignore[no-untyped-call]

    def plain_parts() -> None:
        module.zero_grad()
        for part in x.chunk(size.chunks):
            (_loss(module(part)) / size.chunks).backward()

    def piped_parts() -> None:
        module.zero_grad()
        pipe.train_step(x, None, _loss, "micro_batch")

    return {"loss over the mini-batch": (plain_whole, piped_whole), "loss by micro-batch": (plain_parts, piped_parts)}


def _loss(y: Tensor, _: Any = None) -> Tensor:
    return y.square().mean()


def repeated(step: Step, count: int, least: float = 0.05) -> Callable[[], float]:
    """``step`` as a contender: seconds of one, from ``count`` in a row, fewer where they take long.

    As many before are not counted: in training, a step follows upon a step, with the processor awake and caches warm.
    """

    def once() -> float:
        seconds = 0.0
        for _ in range(2):
            start = perf_counter()
            done = 0
            while done < count and (perf_counter() - start < least or not done):
                step()
                done += 1
            seconds = (perf_counter() - start) / done
        return seconds

    return once


def compared(sizes: tuple[Size, ...], rounds: int, count: int) -> tuple[list[Result], dict[str, Samples], Figure]:
    """K = 1 and plain PyTorch in turn, at every size."""
    contenders: dict[str, Callable[[], float]] = {}
    cell_seconds = {size: _cell_seconds(size) for size in sizes}
    for size in sizes:
        for way, (plain, piped) in steps(size).items():
            contenders[f"{size}, {way}: plain"] = repeated(plain, count)
            contenders[f"{size}, {way}: K=1"] = repeated(piped, count)
    samples = interleave(contenders, rounds)
    results = []
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for way in steps(sizes[0]):
        rows, ratios = [], []
        for size in sizes:
            plain, piped = (samples[f"{size}, {way}: {who}"] for who in ("plain", "K=1"))
            ratios.append(ratio(piped, plain))
            rows.append(
                [
                    str(size),
                    f"{1e6 * cell_seconds[size]:,.0f}",
                    *map(_milliseconds, (plain, piped)),
                    f"{ratios[-1]:.3f}",
                    f"{1e6 * (piped.median - plain.median) / (2 * size.chunks):.0f}",
                ]
            )
        axes.plot([1e3 * cell_seconds[size] for size in sizes[3:]], ratios[3:], marker="o", label=way)
        columns = "cells|a cell forward, us|plain, ms|K = 1, ms|K = 1 / plain|difference, us an action".split("|")
        note = (
            "Medians and quartiles of a step: forward, loss and backward of all micro-batches, none recomputed, one "
            "intra-op thread; the ratio is the median of those within a round. "
            "Plain runs the same micro-batches. An action is one forward or one backward; what a "
            "mini-batch costs once is spread over its 2 M actions. It does not show what several stages gain or wait."
        )
        results.append(Result(f"K = 1 against plain PyTorch, {way}", columns, rows, note))
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="forward of a cell on a micro-batch, ms", ylabel="K = 1 / plain PyTorch")
    axes.set_title("What wrapping alone costs")
    axes.legend()
    return results, samples, figure


def fitted(sizes: Sequence[Size], samples: dict[str, Samples]) -> Result:
    """What an action costs and what a mini-batch does once: a line through the differences of one size, over 2 M."""
    rows = []
    for way in steps(sizes[0]):
        found = [(samples[f"{size}, {way}: K=1"], samples[f"{size}, {way}: plain"]) for size in sizes]
        line = linear_regression(
            [2 * size.chunks for size in sizes], [1e6 * (piped.median - plain.median) for piped, plain in found]
        )
        rows.append([way, f"{line.slope:.0f}", f"{line.intercept:.0f}"])
    title = f"What is spent an action, and what once: a line through M = {', '.join(str(s.chunks) for s in sizes)}"
    note = (
        f"Least squares through the differences of {sizes[0].cells} x Linear({sizes[0].width}), {sizes[0].rows} rows."
    )
    return Result(title, ["loss", "us an action", "us a mini-batch"], rows, note)


def _milliseconds(samples: Samples) -> str:
    low, high = samples.spread
    return f"{1e3 * samples.median:.3f} ({1e3 * low:.3f} to {1e3 * high:.3f})"


def _cell_seconds(size: Size) -> float:
    """Of one forward, the fastest of a few."""
    module, x = nn.Linear(size.width, size.width), torch.randn(size.rows, size.width)
    found = []
    for _ in range(12):
        start = perf_counter()
        module(x)
        found.append(perf_counter() - start)
    return min(found)


# --- where it goes ----------------------------------------------------------------------------------------------------

ROOMS = {
    "gpipe/worker.py": "worker loop",
    "gpipe/transport.py": "receive and send",
    "gpipe/stage.py": "stage: forward and backward of a micro-batch",
    "gpipe/ways.py": "stage: forward and backward of a micro-batch",
    "gpipe/phase.py": "stage: forward and backward of a micro-batch",
    "gpipe/partitioning/skips.py": "stage: forward and backward of a micro-batch",
    "gpipe/boundary.py": "boundary: cut from the graph, opened again",
    "gpipe/memory.py": "copies of the inputs",
    "gpipe/rng.py": "random draws: seeds and guard",
    "gpipe/autograd.py": "autograd door",
    "gpipe/microbatch.py": "scatter and gather",
    "gpipe/loss.py": "loss",
    "torch/autograd/": "torch: backward of every micro-batch",
    "torch/nn/": "cells",
    "benchmarks/": "loss",
}


def breakdown(size: Size, count: int) -> Result:
    """Where the time of a step goes, by the rooms of the runtime."""
    _, piped = steps(size)["loss by micro-batch"]
    for _ in range(3):
        piped()
    seen = cProfile.Profile()
    with seen:
        for _ in range(count):
            piped()
    seconds = _by_room(seen)
    total, actions = sum(seconds.values()), 2 * size.chunks * count
    rows = [[room, f"{1e6 * s / actions:.1f}", f"{100 * s / total:.0f} %"] for room, s in seconds.most_common()]
    rows.append(["all", f"{1e6 * total / actions:.1f}", "100 %"])
    note = (
        "By cProfile, which makes every call dearer, Python's most: read the shares. Functions of torch that are "
        "written in C++ count for the room that calls them."
    )
    return Result(f"Where a step goes, {size}, loss by micro-batch", ["room", "us an action", "share"], rows, note)


def _by_room(profile: cProfile.Profile) -> Counter[str]:
    """Seconds by room; those of functions of no room by that of their callers."""
    found: Counter[str] = Counter()
    table: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for function, (_, _, own, _, callers) in table.items():
        room = _room(function[0])
        if room is not None:
            found[room] += own
            continue
        known = {caller: times[2] for caller, times in callers.items() if _room(caller[0])}
        for caller, part in known.items():
            found[str(_room(caller[0]))] += part
        found["mini-batch: contexts, gradients, set-up"] += max(0.0, own - sum(known.values()))
    return found


def _room(path: str) -> str | None:
    path = path.replace("gpipe/gpipe/", "gpipe/")
    for part, room in ROOMS.items():
        if part in path:
            return room
    return "mini-batch: contexts, gradients, set-up" if "/gpipe/" in path and path.endswith(".py") else None


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=50, help="steps a sample, of the tiny sizes")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny leaves the large cells out")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = SIZES if given.size == "full" else SIZES[:4]
    results, samples, figure = compared(sizes, given.rounds, given.steps)
    tiny = [breakdown(size, 4 * given.steps) for size in sizes[1:3]]
    report("overhead", [*results, fitted(sizes[:3], samples), *tiny], samples, figure=figure)


if __name__ == "__main__":
    main()
