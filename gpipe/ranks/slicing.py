"""A rank's slice of a model: its own cells, and nothing of the others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from gpipe.partitioning.cells import Cell, cells_of
from gpipe.ranks.deferred import Recorded, recorded
from gpipe.rng import cell_seed

_WEIGHTS = -1  # in place of a step: weights are drawn before the first

Factory = Callable[[], nn.Module]


def weight_seed(seed: int, cell: int) -> int:
    """The seed of a cell's initial weights, in [0, 2**63)."""
    return cell_seed(seed, _WEIGHTS, 0, cell)


def initialised(factory: Factory, seed: int) -> nn.Module:
    """The module that the ranks of a pipeline make of ``factory``, slice by slice, made as a whole on the CPU.

    Args:
        factory: Makes the module; called under ``torch.device("meta")``.
        seed: Base seed of the pipeline.

    Raises:
        TypeError, ValueError: The factory makes no such module, or one whose values cannot be made later.
    """
    built = recorded(factory)
    materialise(built, cells_of(built.module), 0, seed, torch.device("cpu"))
    return built.module


def materialise(built: Recorded, own: Sequence[Cell], first: int, seed: int, device: torch.device) -> None:
    """Give ``own`` cells, and what is in no cell, their initial values; one cell after the other comes to ``device``.

    Args:
        built: The module on the meta device.
        own: Consecutive cells.
        first: Index in the whole module of the first of them.
        seed: Base seed; every cell draws from a seed of its own, so that values do not depend on the slice.
        device: Where the cells are to live.
    """
    every = [cell for _, cell in cells_of(built.module)]
    held = {id(t) for cell in every for _, t in _tensors(cell)}
    loose = [(name, t) for name, t in _tensors(built.module) if id(t) not in held]
    for i, (name, cell) in enumerate(own, start=first):
        built.materialise([(f"{name}.{n}", t) for n, t in _tensors(cell)], weight_seed(seed, i))
        cell.to(device)
    built.materialise(loose, weight_seed(seed, len(every)))


def keep_slice(module: nn.Module, cells: Sequence[Cell], own: Sequence[int]) -> None:
    """Take out of ``module``, in place, all parameters, buffers and children that belong to other cells alone.

    Args:
        module: What is sliced.
        cells: All its cells.
        own: Indices of those that stay.
    """
    mine = {id(t) for i in own for _, t in _tensors(cells[i][1])}
    foreign = {id(t) for _, cell in cells for _, t in _tensors(cell)} - mine
    if isinstance(module, nn.Sequential):
        for i, (name, _) in enumerate(cells):
            if i not in own:
                del module._modules[name]
    for part in module.modules():
        for registry in (part._parameters, part._buffers):
            for name in [n for n, t in registry.items() if id(t) in foreign]:
                del registry[name]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
