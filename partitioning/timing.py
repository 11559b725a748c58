"""Seconds of cells, forward and backward."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from gpipe.partitioning.alone import Alone, Passed, Waiting, cut
from gpipe.partitioning.clock import Moment, clock, host_seconds
from gpipe.partitioning.footprint import opened

_ROUND_SECONDS = 0.005  # of a device, that a round takes at least, by runs of up to so many:
_MOST_RUNS = 50


class Seconds(NamedTuple):
    """One forward and one backward of a cell."""

    forward: float
    backward: float


def rounds(cells: Sequence[Alone], inputs: Any) -> Iterator[list[Seconds]]:
    """Time copies of the cells on the CPU, on one micro-batch, as often as asked.

    All go forward, then all backward, as in a stage: caches and memory are as cold as in training, and hold two
    micro-batches.
    """
    copies = [_placed(cell, torch.device("cpu")) for cell in cells]
    _timed(copies, inputs)  # pays for what is made only once
    while True:
        yield _under_way(copies, inputs)


def one_by_one(
    cells: Sequence[Alone], value: Any, device: torch.device, repeats: int, timeout: float = 0.0
) -> list[list[Seconds]]:
    """Time copies of the cells on an accelerator, one at a time, so that a model larger than it can be measured.

    The seconds are the device's, which always has work ahead of it: launching counts, as in training, only where it
    takes longer than what is launched. Of a short cell a round is the mean of many runs.

    Args:
        cells: The cells.
        value: The micro-batch, on the device.
        device: The accelerator.
        repeats: Rounds of every cell at least.
        timeout: Seconds, of all cells, to go on with further rounds.

    Returns:
        Per cell the seconds of its rounds.
    """
    found = []
    waiting: Waiting = {}
    for cell in cells:
        entered = cell.entered(value, waiting)
        copied = _placed(cell, device)
        with located(cell):
            seconds, left = _cell_rounds(copied, entered, device, repeats, timeout / len(cells))
        found.append(seconds)
        value = cell.went_on(left, waiting)
    return found


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
                _timed(copies, inputs)

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


def _cell_rounds(
    cell: Alone, entered: Passed, device: torch.device, repeats: int, timeout: float
) -> tuple[list[Seconds], Passed]:
    now = _clock(device)
    _run(cell, entered, device, now)  # pays for what is made only once
    first, left = _run(cell, entered, device, now)
    runs = max(1, min(_MOST_RUNS, math.ceil(_ROUND_SECONDS / max(sum(_mean([first])), 1e-9))))
    found: list[Seconds] = []
    end = perf_counter() + timeout
    while len(found) < repeats or perf_counter() < end:
        _run(cell, entered, device, now)  # the device's work ahead
        found.append(_mean([_run(cell, entered, device, now)[0] for _ in range(runs)]))
    return found, left


def _run(
    cell: Alone, entered: Passed, device: torch.device, now: Callable[[], Moment]
) -> tuple[tuple[Moment, ...], Passed]:
    """Launch a forward and a backward; the moments before and after each, and the output."""
    start = now()
    left = cell(opened(entered))
    done = now()
    entry = _Entry.of(left)
    left = cut(left)
    gradients = entry.gradients(device)
    back = now()
    entry.backward(gradients)
    return (start, done, back, now()), left


def _mean(runs: Sequence[tuple[Moment, ...]]) -> Seconds:
    """Waits for the device."""
    times = np.reshape(host_seconds(moment for run in runs for moment in run), (len(runs), 2, 2))
    forward, backward = (times[:, :, 1] - times[:, :, 0]).mean(axis=0).tolist()
    return Seconds(forward, backward)


def _clock(device: torch.device) -> Callable[[], Moment]:
    """The device's; where it has none, the time once it has done all its work."""
    now = clock(device)
    if device.type in ("cpu", "meta") or now is not perf_counter:
        return now

    def when_done() -> float:
        torch.accelerator.synchronize(device)
        return perf_counter()

    return when_done


def _timed(cells: Sequence[Alone], value: Any) -> list[Seconds]:
    """All forward, all backward."""
    forward, entries = _forward(cells, value)
    return _joined(forward, _backward(cells, entries))


def _under_way(cells: Sequence[Alone], inputs: Any) -> list[Seconds]:
    """The same with another micro-batch under way, whose backward is the one timed.

    The first backward after a forward gets memory from the system that the next, in a stage, finds free.
    """
    _, first = _forward(cells, inputs)
    forward, second = _forward(cells, inputs)
    _backward(cells, second)
    return _joined(forward, _backward(cells, first))


def _joined(forward: Sequence[float], backward: Sequence[float]) -> list[Seconds]:
    return [Seconds(f, b) for f, b in zip(forward, backward, strict=True)]


def _forward(cells: Sequence[Alone], value: Any) -> tuple[list[float], list[_Entry]]:
    """The seconds of every cell, and where its backward begins."""
    seconds, entries = [], []
    waiting: Waiting = {}
    for cell in cells:
        entered = cell.entered(value, waiting)
        with located(cell):
            start = perf_counter()
            left = cell(opened(entered))
            seconds.append(perf_counter() - start)
        entries.append(_Entry.of(left))
        value = cell.went_on(cut(left), waiting)
        del entered, left
    return seconds, entries


def _backward(cells: Sequence[Alone], entries: Sequence[_Entry]) -> list[float]:
    """The seconds of every cell, in the order of the cells."""
    seconds = []
    for cell, entry in zip(reversed(cells), reversed(entries), strict=True):
        gradients = entry.gradients(torch.device("cpu"))
        with located(cell):
            start = perf_counter()
            entry.backward(gradients)
            seconds.append(perf_counter() - start)
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

    def gradients(self, device: torch.device) -> list[Tensor]:
        return [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in self.kinds]

    def backward(self, gradients: list[Tensor]) -> None:
        if self.edges:
            torch.autograd.backward(self.edges, gradients)
