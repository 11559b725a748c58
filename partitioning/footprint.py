"""What a cell holds, counted in storages: each once, parameters and buffers not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from gpipe.partitioning.live import meter


@dataclass(frozen=True)
class Footprint:
    """Bytes of one cell on one micro-batch.

    Attributes:
        activation_bytes: Kept by autograd, the cell's input excluded.
        boundary_bytes: The output.
        forward_peak: The most that is held during forward, the input excluded.
        backward_peak: The most that is held during backward: what autograd kept, the gradients of output and input, and
            whatever comes and goes; the totals of the parameters' gradients excluded.
        kept_inputs: Bytes of each leaf of the input that autograd keeps, by its number.
        outputs: Bytes of each leaf of the output, by its number.
        kept_outputs: Numbers of the leaves of the output that autograd keeps.
    """

    activation_bytes: int
    boundary_bytes: int
    forward_peak: int
    backward_peak: int
    kept_inputs: Mapping[int, int]
    outputs: Mapping[int, int]
    kept_outputs: frozenset[int]


class Owned(NamedTuple):
    """The bytes a cell of a chain answers for; see ``CellCost``, whose names these are."""

    activation_bytes: int
    boundary_bytes: int
    workspace_bytes: int
    kept_input_bytes: int
    handed_on_bytes: int


def owned_bytes(footprints: Sequence[Footprint]) -> list[Owned]:
    """Per cell what autograd keeps of it, and of its output what only the next cell's graph keeps; and all the rest."""
    owned = []
    passing = 0  # of the cell's input: kept by nobody, but there while the cell runs
    for cell, following in zip_longest(footprints, footprints[1:]):
        wanted = following.kept_inputs if following else {}
        handed_on = sum(size for leaf, size in wanted.items() if leaf not in cell.kept_outputs)
        activations = cell.activation_bytes + handed_on
        most = max(cell.forward_peak + passing, cell.backward_peak)
        owned.append(
            Owned(
                activation_bytes=activations,
                boundary_bytes=cell.boundary_bytes,
                workspace_bytes=max(0, most - activations),
                kept_input_bytes=sum(cell.kept_inputs.values()),
                handed_on_bytes=handed_on,
            )
        )
        passing = sum(size for leaf, size in cell.outputs.items() if leaf not in {*wanted, *cell.kept_outputs})
    return owned


def footprint(cell: nn.Module, value: Any, device: torch.device) -> tuple[Footprint, Any]:
    """Run ``cell`` on ``value``, forward twice and backward once; gives its footprint and its output."""
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    backward_peak = _backward_peak(cell, value, device)
    own = {_address(t) for t in (*cell.parameters(), *cell.buffers())}
    saved: dict[int, Tensor] = {}  # by storage, and held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            saved.setdefault(_address(tensor), tensor.detach())
        return tensor

    start = opened(value)
    with meter(device) as held, saved_tensors_hooks(pack, _same):
        output = cell(start)
    inputs = _addresses(start)
    found = Footprint(
        activation_bytes=sum(_bytes(t) for address, t in saved.items() if address not in inputs.values()),
        boundary_bytes=sum(t.numel() * t.element_size() for t in tree_leaves(output) if isinstance(t, Tensor)),
        forward_peak=held.peak,
        backward_peak=backward_peak,
        kept_inputs={leaf: _bytes(saved[address]) for leaf, address in inputs.items() if address in saved},
        outputs={leaf: _bytes(t) for leaf, t in enumerate(tree_leaves(output)) if isinstance(t, Tensor)},
        kept_outputs=frozenset(leaf for leaf, address in _addresses(output).items() if address in saved),
    )
    return found, output


def _backward_peak(cell: nn.Module, value: Any, device: torch.device) -> int:
    """As in a stage: while a cell goes backward, its output lives on only if autograd keeps it."""
    with meter(device) as held:
        output = cell(opened(value))
        roots = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        edges = [get_gradient_edge(root) for root in roots]
        gradients = [torch.ones_like(root) for root in roots]
        del output, roots
        held.restart()
        if edges:
            torch.autograd.backward(edges, gradients)
    return held.peak


def opened(value: Any) -> Any:
    """``value`` as the start of a graph, in its own storage, but not as leaves: cells may write to it in place."""
    return tree_map_only(Tensor, lambda t: _Open.apply(t) if t.requires_grad else t, value)


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


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
