"""What autograd keeps of a cell's forward, counted in storages: each once, parameters and buffers not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Footprint:
    """Bytes of one cell on one micro-batch.

    Attributes:
        activation_bytes: Kept by autograd, the cell's input excluded.
        kept_input_bytes: Of the input, kept by autograd, and not kept for the cell before already.
        boundary_bytes: The output.
        workspace_bytes: Needed on top while forward or backward runs; measured on accelerators only.
    """

    activation_bytes: int
    kept_input_bytes: int
    boundary_bytes: int
    workspace_bytes: int = 0


class SavedStorages:
    """Measures the cells of a chain one after the other, knowing what the cells before have kept."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # by storage address; held, so that no address comes twice

    def measure(self, cell: nn.Module, value: Any) -> tuple[Footprint, Any]:
        """Run ``cell`` on ``value``; gives its footprint and its output."""
        own = {_address(t) for t in (*cell.parameters(), *cell.buffers())}
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _address(tensor) not in own:
                saved.setdefault(_address(tensor), tensor.detach())
            return tensor

        opened = tree_map_only(Tensor, _opened, value)
        inputs = {_address(t): t for t in tree_leaves(opened) if isinstance(t, Tensor)}
        with saved_tensors_hooks(pack, _same):
            output = cell(opened)
        footprint = Footprint(
            activation_bytes=sum(_bytes(t) for a, t in saved.items() if a not in inputs),
            kept_input_bytes=sum(_bytes(t) for a, t in saved.items() if a in inputs and a not in self._kept),
            boundary_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(output) if isinstance(t, Tensor)),
        )
        self._kept = {**{a: t for a, t in self._kept.items() if a in inputs}, **saved}
        return footprint, output


class _Open(torch.autograd.Function):
    """The start of a graph that is no leaf, so that cells may write to it in place, in the storage it came in."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _opened(tensor: Tensor) -> Tensor:
    opened: Tensor = _Open.apply(tensor) if tensor.requires_grad else tensor
    return opened


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
