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
from torch.utils._pytree import tree_leaves

from gpipe.partitioning.alone import Alone, Waiting, cut
from gpipe.partitioning.footprint import opened


class Seconds(NamedTuple):
    """One forward and one backward of a cell."""

    forward: float
    backward: float


def rounds(cells: Sequence[Alone], inputs: Any, device: torch.device) -> Iterator[list[Seconds]]:
    """Time copies of the cells on one micro-batch, as often as asked.

    On the CPU all go forward, then all backward, as in a stage: caches and memory are as cold as in training, and hold
    two micro-batches. On an
    accelerator, where that matters less, one at a time is there, so that a model larger than it can be measured.
    """
    if device.type == "cpu":
        copies = [_placed(cell, device) for cell in cells]
        _timed(copies, inputs, {}, device)  # pays for what is made only once
        while True:
            yield _under_way(copies, inputs, device)
    while True:
        yield _one_by_one(cells, inputs, device)


@contextmanager
def in_company(others: int, cells: Sequence[Alone], inputs: Any) -> Iterator[None]:
    """Have so many other threads run copies of the cells on the CPU all the while.

    So do the other stages of a pipeline on the same processor, with which a stage shares memory and caches.
    """
    ended = threading.Event()
    count = torch.get_num_threads()

    def run() -> None:
        torch.get_num_threads()  # otherwise the first operator would set this thread's number to the process's
        torch.set_num_threads(count)
        copies = [_placed(cell, torch.device("cpu")) for cell in cells]
        while not ended.is_set():
            with suppress(Exception):  # whoever measures meets it too
                _timed(copies, inputs, {}, torch.device("cpu"))

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
def located(cell: Alone) -> Iterator[None]:
    """Name the cell in what is raised inside."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"gpipe: raised while profiling {cell}")
        raise


def _placed(cell: Alone, device: torch.device) -> Alone:
    with located(cell):
        return copy.deepcopy(cell).to(device)


def _one_by_one(cells: Sequence[Alone], value: Any, device: torch.device) -> list[Seconds]:
    found = []
    waiting: Waiting = {}
    for cell in cells:
        copied = [_placed(cell, device)]
        _timed(copied, value, dict(waiting), device)
        seconds, value = _timed(copied, value, waiting, device)
        found += seconds
    return found


def _timed(cells: Sequence[Alone], value: Any, waiting: Waiting, device: torch.device) -> tuple[list[Seconds], Any]:
    """All forward, all backward; the seconds, and the output."""
    forward, entries, left = _forward(cells, value, waiting, device)
    return _joined(forward, _backward(cells, entries, device)), left


def _under_way(cells: Sequence[Alone], inputs: Any, device: torch.device) -> list[Seconds]:
    """The same with another micro-batch under way, whose backward is the one timed.

    The first backward after a forward gets memory from the system that the next, in a stage, finds free.
    """
    _, first, _ = _forward(cells, inputs, {}, device)
    forward, second, _ = _forward(cells, inputs, {}, device)
    _backward(cells, second, device)
    return _joined(forward, _backward(cells, first, device))


def _joined(forward: Sequence[float], backward: Sequence[float]) -> list[Seconds]:
    return [Seconds(f, b) for f, b in zip(forward, backward, strict=True)]


def _forward(
    cells: Sequence[Alone], value: Any, waiting: Waiting, device: torch.device
) -> tuple[list[float], list[_Entry], Any]:
    """The seconds of every cell, where its backward begins, and the output."""
    seconds, entries = [], []
    for cell in cells:
        entered = cell.entered(value, waiting)
        with located(cell):
            start = _now(device)
            left = cell(opened(entered))
            seconds.append(_now(device) - start)
        entries.append(_Entry.of(left))
        value = cell.went_on(cut(left), waiting)
        del entered, left
    return seconds, entries, value


def _backward(cells: Sequence[Alone], entries: Sequence[_Entry], device: torch.device) -> list[float]:
    """The seconds of every cell, in the order of the cells."""
    seconds = []
    for cell, entry in zip(reversed(cells), reversed(entries), strict=True):
        gradients = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in entry.kinds]
        with located(cell):
            start = _now(device)
            if entry.edges:
                torch.autograd.backward(entry.edges, gradients)
            seconds.append(_now(device) - start)
        entry.edges.clear()
    return seconds[::-1]


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
