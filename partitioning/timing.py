"""Seconds of cells, forward and backward."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from gpipe.partitioning.cells import Cell
from gpipe.partitioning.footprint import opened


class Seconds(NamedTuple):
    """One forward and one backward of a cell."""

    forward: float
    backward: float


def rounds(cells: Sequence[Cell], inputs: Any, device: torch.device) -> Iterator[list[Seconds]]:
    """Time copies of the cells on one micro-batch, as often as asked.

    On the CPU all go forward, then all backward, as in a stage: caches and memory are as cold as in training. On an
    accelerator, where that matters less, one at a time is there, so that a model larger than it can be measured.
    """
    if device.type == "cpu":
        copies = [_placed(i, cell, device) for i, cell in enumerate(cells)]
        _timed(copies, inputs, device)  # pays for what is made only once
        while True:
            yield _timed(copies, inputs, device)[0]
    while True:
        yield _one_by_one(cells, inputs, device)


@contextmanager
def in_company(others: int, cells: Sequence[Cell], inputs: Any) -> Iterator[None]:
    """Have so many other threads run copies of the cells on the CPU all the while.

    So do the other stages of a pipeline on the same processor, with which a stage shares memory and caches.
    """
    ended = threading.Event()
    count = torch.get_num_threads()

    def run() -> None:
        torch.get_num_threads()  # otherwise the first operator would set this thread's number to the process's
        torch.set_num_threads(count)
        copies = [_placed(i, cell, torch.device("cpu")) for i, cell in enumerate(cells)]
        while not ended.is_set():
            with suppress(Exception):  # whoever measures meets it too
                _timed(copies, inputs, torch.device("cpu"))

    threads = [threading.Thread(target=run, name=f"gpipe-company-{i}", daemon=True) for i in range(others)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def located(index: int, cell: Cell) -> Iterator[None]:
    """Name the cell in what is raised inside."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"gpipe: raised while profiling cell {index} ({cell[0]!r}, {type(cell[1]).__name__})")
        raise


_Placed = tuple[int, Cell]


def _placed(index: int, cell: Cell, device: torch.device) -> _Placed:
    with located(index, cell):
        return index, (cell[0], copy.deepcopy(cell[1]).to(device))


def _one_by_one(cells: Sequence[Cell], value: Any, device: torch.device) -> list[Seconds]:
    found = []
    for i, cell in enumerate(cells):
        copied = [_placed(i, cell, device)]
        _timed(copied, value, device)
        seconds, value = _timed(copied, value, device)
        found += seconds
    return found


def _timed(cells: Sequence[_Placed], value: Any, device: torch.device) -> tuple[list[Seconds], Any]:
    """All forward, all backward; the seconds, and the output."""
    forward, entries = [], []
    for i, cell in cells:
        with located(i, cell):
            start = _now(device)
            output = cell[1](opened(value))
            forward.append(_now(device) - start)
        entries.append(_Entry.of(output))
        value = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), output)
        del output
    backward = []
    for (i, cell), entry in zip(reversed(cells), reversed(entries), strict=True):
        gradients = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in entry.kinds]
        with located(i, cell):
            start = _now(device)
            if entry.edges:
                torch.autograd.backward(entry.edges, gradients)
            backward.append(_now(device) - start)
        entry.edges.clear()
    return [Seconds(f, b) for f, b in zip(forward, reversed(backward), strict=True)], value


class _Entry(NamedTuple):
    """Where gradients enter a cell's graph, without holding its output."""

    edges: list[GradientEdge]
    kinds: list[tuple[torch.Size, torch.dtype]]

    @classmethod
    def of(cls, output: Any) -> _Entry:
        roots = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        return cls([get_gradient_edge(t) for t in roots], [(t.shape, t.dtype) for t in roots])


def _now(device: torch.device) -> float:
    """The time, once an accelerator has done all its work."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return perf_counter()
