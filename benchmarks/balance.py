"""Uneven models in two stages, cut at every place: which cut do the partitioners choose, and what does it cost?

Run: python -m benchmarks.balance [--rounds 3] [--models U-Net]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gpipe
from benchmarks.block_partition import block_partition
from benchmarks.harness import Result, Samples, interleave, report, steady
from benchmarks.models import NETS, Net
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import solve

QUESTION = "How good are the cuts of uneven models: ours, torchgpipe's and as many cells each, beside the best of all?"
STAGES, CHUNKS = 2, 4


MODELS = ("AmoebaNet-D", "U-Net", "CLIP ViT")


def chosen(net: Net) -> dict[str, int]:
    """Cells of the first stage, by partitioner; ours and torchgpipe's from the same profile."""
    module, _ = net.made()
    inputs, _ = net.batch()
    costs = profile(module, inputs, chunks=CHUNKS, repeats=5, company=STAGES - 1)
    times = [c.forward_seconds + c.backward_seconds for c in costs]
    return {
        "gpipe": solve(costs, STAGES, micro_batches=CHUNKS, keep=CHUNKS).balance[0],
        "torchgpipe": block_partition(times, STAGES)[0],
        "as many cells each": (len(costs) + 1) // 2,
    }


def cuts(net: Net) -> dict[int, Callable[[], float]]:
    """A training step for every cut, by the cells of the first stage."""
    module, loss = net.made()
    inputs, targets = net.batch()
    cells = len(cells_of(module))

    def step(pipe: gpipe.GPipe) -> None:
        pipe.zero_grad()
        pipe.train_step(inputs, targets, loss, "micro_batch")

    found: dict[int, Callable[[], float]] = {}
    for first in range(1, cells):
        torch.set_num_threads(STAGES)
        pipe = gpipe.GPipe(module, [first, cells - first], devices=["cpu"] * STAGES, chunks=CHUNKS, checkpoint="never")
        torch.set_num_threads(1)
        found[first] = steady(partial(step, pipe))
    return found


def table(choices: Mapping[str, dict[str, int]], samples: Mapping[str, Samples]) -> Result:
    """What every partitioner chose, and the step's seconds over those of the best cut."""
    rows = []
    for name, by in choices.items():
        medians = _medians(name, samples)
        best = min(medians, key=lambda first: medians[first])
        cells = len(medians) + 1
        for who, first in {"best of all, measured": best, **by}.items():
            low, high = samples[f"{name}, {first}"].spread
            rows.append(
                [
                    name,
                    who,
                    f"{first}+{cells - first}",
                    f"{medians[first]:.3f} ({low:.3f} to {high:.3f})",
                    f"{medians[first] / medians[best]:.3f}",
                ]
            )
    columns = ["model", "cut by", "cells", "seconds a step", "over the best"]
    note = (
        "Every cut was run, in turn with all others; medians and quartiles of a step of 4 micro-batches, none "
        "recomputed, one intra-op thread a stage. The best is the smallest of so many medians, so noise makes it look "
        "better than it is. torchgpipe's partitioner is restated (benchmarks/block_partition.py) and given the same "
        "profile as ours; as many cells each gives the first stage the odd one. Two stages only: with more there are "
        "more ways to be wrong, see benchmarks.partitioning."
    )
    return Result("Cuts of uneven models in two stages", columns, rows, note)


def _medians(name: str, samples: Mapping[str, Samples]) -> dict[int, float]:
    found = ((key.rpartition(", "), s.median) for key, s in samples.items())
    return {int(first): median for (net, _, first), median in found if net == name}


def draw(choices: Mapping[str, dict[str, int]], samples: Mapping[str, Samples]) -> Figure:
    """Seconds of every cut, the choices marked."""
    figure = Figure(figsize=(4 * len(choices), 3.6), layout="constrained")
    panels: Any = figure.subplots(1, len(choices), squeeze=False)[0]
    for index, (name, by) in enumerate(choices.items()):
        axes: Axes = panels[index]
        medians = _medians(name, samples)
        axes.plot(list(medians), list(medians.values()), color="grey", marker=".")
        for (who, first), marker in zip(by.items(), "os^", strict=True):
            axes.plot(first, medians[first], marker=marker, markersize=9, linestyle="", label=who, fillstyle="none")
        axes.set(
            title=name.partition(",")[0], xlabel="cells of the first stage", ylabel="seconds a step", ylim=(0, None)
        )
        axes.title.set_fontsize("small")
        axes.legend(fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=list(NETS), default="full")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    nets = {f"{name}, {NETS[given.size][name].about}": NETS[given.size][name] for name in given.models}
    choices = {name: chosen(net) for name, net in nets.items()}
    contenders = {f"{name}, {first}": step for name, net in nets.items() for first, step in cuts(net).items()}
    samples = interleave(contenders, given.rounds)
    report("balance", [table(choices, samples)], samples, figure=draw(choices, samples))


if __name__ == "__main__":
    main()
