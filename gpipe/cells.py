"""What a pipe takes over from the module it wraps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from gpipe.partitioning.cells import Cell


def refuse_shared_parameters(stages: Sequence[Sequence[Cell]]) -> None:
    """Raise a ValueError if two stages use the same parameter."""
    seen: dict[int, tuple[int, str]] = {}
    for k, cells in enumerate(stages):
        for cell_name, cell in cells:
            for name, parameter in cell.named_parameters(prefix=cell_name):
                other, other_name = seen.setdefault(id(parameter), (k, name))
                if other != k:
                    raise ValueError(
                        f"every parameter must belong to one stage, but stage {other} uses it as {other_name!r} and "
                        f"stage {k} as {name!r}: choose a balance that puts these cells on one stage"
                    )


def registries(module: nn.Module) -> dict[str, Any]:
    """What makes ``module`` an ``nn.Module`` - parameters, buffers, children, hooks - as the very same objects."""
    return {key: vars(module)[key] for key in vars(nn.Module())}
