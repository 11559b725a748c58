"""What a pipe takes over from the module it wraps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from gpipe.partitioning.cells import Cell


def refuse_sharing(stages: Sequence[Sequence[Cell]]) -> None:
    """Raise a ValueError if two stages use the same parameter or buffer."""
    seen: dict[int, tuple[int, str]] = {}
    for k, cells in enumerate(stages):
        for cell_name, cell in cells:
            for name, tensor in chain(cell.named_parameters(cell_name), cell.named_buffers(cell_name)):
                other, other_name = seen.setdefault(id(tensor), (k, name))
                if other != k:
                    raise ValueError(
                        f"every parameter and buffer must belong to one stage, but stage {other} uses one as "
                        f"{other_name!r} and stage {k} as {name!r}: choose a balance that puts these cells on one "
                        "stage, or give each a copy (copy.deepcopy)"
                    )


def registries(module: nn.Module) -> dict[str, Any]:
    """What makes ``module`` an ``nn.Module`` - parameters, buffers, children, hooks - as the very same objects."""
    return {key: vars(module)[key] for key in vars(nn.Module())}
