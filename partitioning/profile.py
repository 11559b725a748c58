"""Measure what the cells of a module cost: seconds forward and backward, and bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gpipe.partitioning.cells import Cell, cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.footprint import footprint, owned_bytes

T = TypeVar("T")


def profile(
    module: nn.Module,
    sample: Any,
    *,
    device: torch.device | str | None = None,
    chunks: int = 1,
    repeats: int = 5,
    timeout: float = 0.0,
) -> list[CellCost]:
    """Measure every cell of ``module`` on one micro-batch.

    Cells are copied to ``device`` one at a time, so a model larger than the device can be profiled. The module, its
    gradients and buffers, and the random state stay as they were.

    Args:
        module: An ``nn.Sequential``, or a module with ``cells()``.
        sample: A mini-batch of inputs: any pytree of tensors (rows, ...), all on one device.
        device: Where to measure; by default where ``sample`` is.
        chunks: Number of micro-batches; the first, largest one of ``sample`` is measured.
        repeats: Counted rounds over all cells, after one of warm-up, at least; seconds are medians.
        timeout: Seconds to go on with further rounds.

    Returns:
        One cost per cell, in order.

    Raises:
        ValueError: The module is empty, or ``sample`` cannot be used.
        Exception: What a cell raised, with a note that names it.
    """
    cells = cells_of(module)
    if not cells:
        raise ValueError("there is nothing to profile: the module has no cells")
    if repeats < 1:
        raise ValueError(f"repeats, the number of counted rounds, must be at least 1, got {repeats}")
    target = sample_device(sample) if device is None else torch.device(device)
    inputs = tree_map_only(Tensor, lambda t: t.detach().to(target), first_micro_batch(sample, chunks))
    with _random_state_kept(target):
        footprints = _chain(cells, inputs, target, footprint)
        end = perf_counter() + timeout
        rounds = [_chain(cells, inputs, target, _seconds)]
        while len(rounds) < repeats or perf_counter() < end:
            rounds.append(_chain(cells, inputs, target, _seconds))
    owned = owned_bytes(footprints)
    return [
        CellCost(
            name=name,
            forward_seconds=median(seconds[i][0] for seconds in rounds),
            backward_seconds=median(seconds[i][1] for seconds in rounds),
            activation_bytes=owned[i],
            boundary_bytes=footprints[i].boundary_bytes,
            parameter_bytes=sum(p.numel() * p.element_size() for p in cell.parameters()),
        )
        for i, (name, cell) in enumerate(cells)
    ]


def first_micro_batch(sample: Any, chunks: int) -> Any:
    """The first, largest of ``chunks`` micro-batches of ``sample``.

    Raises:
        ValueError: ``sample`` has no tensor, or its tensors disagree in their rows.
    """
    rows = {t.shape[0] for t in tree_leaves(sample) if isinstance(t, Tensor) and t.dim() > 0}
    if len(rows) != 1:
        found = f"tensors of {sorted(rows)} rows" if rows else "no tensor"
        raise ValueError(
            f"sample must hold tensors that all have the same number of rows (dimension 0), found {found}: give one "
            "mini-batch of what the first cell takes"
        )
    (n,) = rows
    size = -(-n // max(1, min(chunks, n)))
    return tree_map_only(Tensor, lambda t: t[:size] if t.dim() > 0 else t, sample)


def sample_device(sample: Any) -> torch.device:
    """The one device all tensors of ``sample`` are on.

    Raises:
        ValueError: They are on several, or there is no tensor.
    """
    devices = {t.device for t in tree_leaves(sample) if isinstance(t, Tensor)}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"the tensors of sample must be on one device, found {found}: move them to the first stage's")
    return devices.pop()


def _chain(
    cells: list[Cell], value: Any, device: torch.device, measure: Callable[[nn.Module, Any], tuple[T, Any]]
) -> list[T]:
    """Measure each cell on what the one before gave."""
    found: list[T] = []
    for i, (name, cell) in enumerate(cells):
        try:
            result, output = measure(copy.deepcopy(cell).to(device), value)
        except BaseException as error:
            error.add_note(f"gpipe: raised while profiling cell {i} ({name!r}, {type(cell).__name__})")
            raise
        found.append(result)
        value = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), output)
    return found


def _seconds(cell: nn.Module, value: Any) -> tuple[tuple[float, float], Any]:
    """Forward and backward seconds of one cell, the second of two runs: the first pays for what is made only once."""
    for _ in range(2):
        start = _now(value)
        output = cell(_opened(value))
        middle = _now(output)
        roots = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        gradients = [torch.ones_like(root) for root in roots]
        begin = _now(output)
        if roots:
            torch.autograd.backward(roots, gradients)
        end = _now(output)
    return (middle - start, end - begin), output


def _opened(value: Any) -> Any:
    """The same values as the start of a graph, not as its leaves: cells may write to them in place."""
    return tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad else t, value)


def _now(tree: Any) -> float:
    """The time, once the accelerator that ``tree`` lives on has done all its work."""
    device = next((t.device for t in tree_leaves(tree) if isinstance(t, Tensor)), torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return perf_counter()


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    others = [] if device.type in ("cpu", "meta") else [device]
    with torch.random.fork_rng(devices=others, device_type=device.type if others else "cuda"):
        yield
