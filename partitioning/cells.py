"""A module as a sequence of cells, the smallest units of partitioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

Cell = tuple[str, nn.Module]


def cells_of(module: nn.Module) -> list[Cell]:
    """The cells of ``module`` in order, with their names.

    Args:
        module: An ``nn.Sequential``, whose children are the cells, or a module with a method ``cells()``.

    Raises:
        TypeError: It is neither, or it is an ``nn.Sequential`` with a forward of its own.
    """
    if callable(getattr(type(module), "cells", None)):
        return _named(module, list(module.cells()))  # type: ignore[operator]
    if not isinstance(module, nn.Sequential):
        raise TypeError(
            f"GPipe wraps an nn.Sequential, or a module with a method cells() that returns its cells in order, "
            f"got {type(module).__name__}: put its layers into an nn.Sequential"
        )
    if type(module).forward is not nn.Sequential.forward:
        raise TypeError(
            f"{type(module).__name__} is an nn.Sequential with a forward() of its own, which a pipeline would not run: "
            "give it a method cells(), or make that forward a cell"
        )
    return [(name, cell) for name, cell in module._modules.items() if cell is not None]


def _named(module: nn.Module, cells: Sequence[Any]) -> list[Cell]:
    for i, cell in enumerate(cells):
        if not isinstance(cell, nn.Module):
            raise TypeError(
                f"{type(module).__name__}.cells() must return nn.Modules, item {i} is {type(cell).__name__}"
            )
    owned = {id(p) for p in module.parameters()}
    held = {id(p) for cell in cells for p in cell.parameters()}
    if owned != held:
        raise ValueError(
            f"the cells of {type(module).__name__} must hold exactly its parameters: {len(owned - held)} of them are "
            f"in no cell, {len(held - owned)} in cells only"
        )
    return [(str(i), cell) for i, cell in enumerate(cells)]
