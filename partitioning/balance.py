"""Cells per stage by time, by operations or by bytes, in torchgpipe's signatures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import owned, profile
from gpipe.partitioning.solve import solve
from gpipe.partitioning.split import split_evenly

_CHUNKS_PER_STAGE = 4  # from so many on the bubble is small: GPipe, arXiv 1811.06965, section 2.3


def balance_by_time(
    partitions: int,
    module: nn.Module,
    sample: Any,
    *,
    timeout: float = 1.0,
    device: torch.device | str | None = None,
) -> list[int]:
    """Cells per stage for the fewest seconds a step, by measured forward and backward seconds of every cell.

    Args:
        partitions: Number of stages, 1 to the number of cells.
        module: An ``nn.Sequential``, or a module with ``cells()``.
        sample: One micro-batch of inputs: any pytree of tensors (rows, ...).
        timeout: Seconds to measure for, at least one round.
        device: Where to measure; by default where ``sample`` is.

    Raises:
        ValueError: There are more stages than cells, or the sample cannot be used.
    """
    _check_partitions(partitions, module)
    return _fastest(partitions, profile(module, sample, device=device, repeats=1, timeout=timeout))


def balance_by_flops(partitions: int, module: nn.Module, sample: Any) -> list[int]:
    """The same by the number of floating-point operations; nothing is allocated, nothing computed.

    Args:
        partitions: Number of stages, 1 to the number of cells.
        module: An ``nn.Sequential``, or a module with ``cells()``; on any device, the meta device too.
        sample: One micro-batch of inputs; only shapes and types count.

    Raises:
        ValueError: There are more stages than cells, or the sample cannot be used.
    """
    _check_partitions(partitions, module)
    return _fastest(partitions, estimate(module, sample, speed=Speed(flops=1.0, bytes=float("inf"))))


def balance_by_size(
    partitions: int,
    module: nn.Module,
    input: Any,
    *,
    chunks: int = 1,
    param_scale: float = 2.0,
    device: torch.device | str | None = None,
) -> list[int]:
    """Cells per stage for the smallest largest stage: activations of one micro-batch, and parameters, in bytes.

    Args:
        partitions: Number of stages, 1 to the number of cells.
        module: An ``nn.Sequential``, or a module with ``cells()``.
        input: A mini-batch of inputs: any pytree of tensors (rows, ...).
        chunks: Number of micro-batches.
        param_scale: Bytes held per byte of parameter: 2 for plain SGD, 3 with momentum, 4 for Adam.
        device: Where to run the cells; by default where ``input`` is.

    Raises:
        ValueError: There are more stages than cells, ``param_scale`` is negative, or the input cannot be used.
    """
    _check_partitions(partitions, module)
    if not 0 <= param_scale < float("inf"):
        raise ValueError(f"param_scale, bytes held per byte of parameter, must be 0 or more, got {param_scale}")
    bytes_ = owned(module, input, device=device, chunks=chunks)
    parameters = [sum(p.nbytes for p in cell.parameters()) for _, cell in cells_of(module)]
    return split_evenly(
        [b.activation_bytes + param_scale * p for b, p in zip(bytes_, parameters, strict=True)], partitions
    )


def _check_partitions(partitions: int, module: nn.Module) -> None:
    """Before anything is measured."""
    count = len(cells_of(module))
    if isinstance(partitions, bool) or not isinstance(partitions, int) or not 1 <= partitions <= count:
        raise ValueError(
            f"partitions, the number of stages, must be 1 to the number of cells, {count}, got {partitions!r}: "
            "no stage may be empty"
        )


def _fastest(stages: int, costs: Sequence[CellCost]) -> list[int]:
    return list(solve(costs, stages, micro_batches=_CHUNKS_PER_STAGE * stages).balance)
