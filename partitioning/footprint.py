"""What autograd keeps of a cell's forward, counted in storages: each once, parameters and buffers not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
        boundary_bytes: The output.
        kept_inputs: Bytes of each leaf of the input that autograd keeps, by its number.
        kept_outputs: Numbers of the leaves of the output that it keeps.
    """

    activation_bytes: int
    boundary_bytes: int
    kept_inputs: Mapping[int, int]
    kept_outputs: frozenset[int]


def owned_bytes(footprints: Sequence[Footprint]) -> list[int]:
    """Per cell of a chain what autograd keeps of it, and of its output what only the next cell's graph keeps."""
    handed_on = [
        sum(size for leaf, size in following.kept_inputs.items() if leaf not in cell.kept_outputs)
        for cell, following in pairwise(footprints)
    ]
    return [f.activation_bytes + more for f, more in zip(footprints, [*handed_on, 0], strict=True)]


def footprint(cell: nn.Module, value: Any) -> tuple[Footprint, Any]:
    """Run ``cell`` on ``value``; gives its footprint and its output."""
    own = {_address(t) for t in (*cell.parameters(), *cell.buffers())}
    saved: dict[int, Tensor] = {}  # by storage, and held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            saved.setdefault(_address(tensor), tensor.detach())
        return tensor

    opened = tree_map_only(Tensor, _opened, value)
    with saved_tensors_hooks(pack, _same):
        output = cell(opened)
    inputs = _addresses(opened)
    found = Footprint(
        activation_bytes=sum(_bytes(t) for address, t in saved.items() if address not in inputs.values()),
        boundary_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(output) if isinstance(t, Tensor)),
        kept_inputs={leaf: _bytes(saved[address]) for leaf, address in inputs.items() if address in saved},
        kept_outputs=frozenset(leaf for leaf, address in _addresses(output).items() if address in saved),
    )
    return found, output


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


def _addresses(tree: Any) -> dict[int, int]:
    """The storage of each leaf that is a tensor, by the leaf's number."""
    return {leaf: _address(t) for leaf, t in enumerate(tree_leaves(tree)) if isinstance(t, Tensor)}


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
