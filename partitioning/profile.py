"""Measure what the cells of a module cost: seconds forward and backward, and bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gpipe.partitioning.alone import Alone, Waiting, alone, cut
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.footprint import Footprint, footprint
from gpipe.partitioning.live import warm
from gpipe.partitioning.owned import Owned, owned_bytes
from gpipe.partitioning.sample import first_micro_batch, sample_device
from gpipe.partitioning.timing import Seconds, in_company, located, one_by_one, rounds


def profile(
    module: nn.Module,
    sample: Any,
    *,
    device: torch.device | str | None = None,
    chunks: int = 1,
    repeats: int = 5,
    timeout: float = 0.0,
    company: int = 0,
) -> list[CellCost]:
    """Measure every cell of ``module`` on one micro-batch.

    Cells are copied to an accelerator one at a time, so a model larger than it can be profiled. The module, its
    gradients and buffers, and the random state stay as they were.

    Args:
        module: An ``nn.Sequential``, or a module with ``cells()``.
        sample: A mini-batch of inputs: any pytree of tensors (rows, ...), all on one device.
        device: Where to measure; by default where ``sample`` is.
        chunks: Number of micro-batches; the first, largest one of ``sample`` is measured.
        repeats: Counted rounds of every cell, after one of warm-up, at least; seconds are medians. On an accelerator
            they are the device's, which is kept busy: launching counts only where it takes longer.
        timeout: Seconds to go on with further rounds.
        company: On the CPU, other threads that run the same cells all the while: stages that share the processor.

    Returns:
        One cost per cell, in order.

    Raises:
        ValueError: The module is empty, or ``sample`` cannot be used.
        TypeError: Declarations of stashes and pops do not match.
        Exception: What a cell raised, with a note that names it.
    """
    if repeats < 1:
        raise ValueError(f"repeats, the number of counted rounds, must be at least 1, got {repeats}")
    cells, inputs, target = _prepared(module, sample, device, chunks)
    with _random_state_kept(target):
        bytes_ = owned_bytes(cells, _footprints(cells, inputs, target))
        if target.type == "cpu":
            seconds = _on_the_cpu(cells, inputs, repeats, timeout, company)
        else:
            seconds = one_by_one(cells, inputs, target, repeats, timeout)
    return [
        CellCost(
            name=cell.name,
            forward_seconds=median(one.forward for one in seconds[i]),
            backward_seconds=median(one.backward for one in seconds[i]),
            parameter_bytes=sum(p.numel() * p.element_size() for p in cell.parameters()),
            **bytes_[i]._asdict(),
        )
        for i, cell in enumerate(cells)
    ]


def _on_the_cpu(cells: list[Alone], inputs: Any, repeats: int, timeout: float, company: int) -> list[list[Seconds]]:
    """Per cell the seconds of its rounds."""
    end = perf_counter() + timeout
    with in_company(company, cells, inputs):
        timed = rounds(cells, inputs)
        found = list(islice(timed, repeats))
        while perf_counter() < end:
            found.append(next(timed))
    return [list(one) for one in zip(*found, strict=True)]


def owned(module: nn.Module, sample: Any, *, device: torch.device | str | None = None, chunks: int = 1) -> list[Owned]:
    """The bytes alone, of every cell on one micro-batch; arguments and errors are those of ``profile``."""
    cells, inputs, target = _prepared(module, sample, device, chunks)
    with _random_state_kept(target):
        return owned_bytes(cells, _footprints(cells, inputs, target))


def _prepared(
    module: nn.Module, sample: Any, device: torch.device | str | None, chunks: int
) -> tuple[list[Alone], Any, torch.device]:
    """Cells, one micro-batch on the device, and the device."""
    cells = alone(cells_of(module))
    if not cells:
        raise ValueError("there is nothing to profile: the module has no cells")
    target = sample_device(sample) if device is None else torch.device(device)
    return cells, tree_map_only(Tensor, lambda t: t.detach().to(target), first_micro_batch(sample, chunks)), target


def _footprints(cells: list[Alone], value: Any, device: torch.device) -> list[Footprint]:
    """Of each cell on what those before gave; one of them is on the device at a time."""
    warm(device)
    found = []
    waiting: Waiting = {}
    for cell in cells:
        with located(cell):
            one, left = footprint(copy.deepcopy(cell).to(device), cell.entered(value, waiting), device)
        found.append(one)
        value = cell.went_on(cut(left), waiting)
    return found


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    others = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(devices=others, device_type=device.type if others else "cuda"):
        yield
