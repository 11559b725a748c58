"""What a cell holds, counted in storages: each once, parameters and buffers not at all."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from gpipe.partitioning.alone import Alone, Passed
from gpipe.partitioning.live import meter


class Stashed(NamedTuple):
    """A tensor that a cell stashes.

    Attributes:
        bytes: What would be sent.
        address: Its storage, as the same cell's others name it.
        kept: Whether autograd keeps it for the cell.
        inputs: Numbers of the leaves of the input that share its storage.
        outputs: Numbers of the leaves of the output that do.
    """

    bytes: int
    address: int
    kept: bool
    inputs: frozenset[int]
    outputs: frozenset[int]


class Gradient(NamedTuple):
    """The gradient of a tensor: the bytes that are sent of it, and those of its storage."""

    sent: int = 0
    storage: int = 0


class Popped(NamedTuple):
    """A tensor that a cell pops: whether autograd keeps it for the cell, and its gradient."""

    kept: bool
    gradient: Gradient


@dataclass(frozen=True)
class Footprint:
    """Bytes of one cell on one micro-batch.

    Attributes:
        activation_bytes: Kept by autograd, the cell's input and what it pops excluded.
        boundary_bytes: The output.
        forward_peak: The most that is held during forward, the input excluded.
        backward_peak: The most that is held during backward: what autograd kept, the gradients of output and input, and
            whatever comes and goes; the totals of the parameters' gradients excluded.
        kept_inputs: Bytes of each leaf of the input that autograd keeps, by its number.
        outputs: Bytes of each leaf of the output, by its number.
        kept_outputs: Numbers of the leaves of the output that autograd keeps.
        stashes: What it stashes, in order; None for None.
        pops: What it pops, in order; None for None.
    """

    activation_bytes: int
    boundary_bytes: int
    forward_peak: int
    backward_peak: int
    kept_inputs: Mapping[int, int]
    outputs: Mapping[int, int]
    kept_outputs: frozenset[int]
    stashes: Sequence[Stashed | None] = ()
    pops: Sequence[Popped | None] = ()


def footprint(cell: Alone, entered: Passed, device: torch.device) -> tuple[Footprint, Passed]:
    """Run ``cell``, forward twice and backward once; gives its footprint and what came out."""
    for parameter in cell.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    backward_peak, gradients = _backward(cell, entered, device)
    own = {_address(t) for t in (*cell.parameters(), *cell.buffers())}
    saved: dict[int, Tensor] = {}  # by storage, and held, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            saved.setdefault(_address(tensor), tensor.detach())
        return tensor

    start = opened(entered)
    with meter(device) as held, saved_tensors_hooks(pack, _same):
        left = cell(start)
    inputs, outputs = _addresses(start.value), _addresses(left.value)
    given = {*inputs.values(), *_addresses(start.skips).values()}
    found = Footprint(
        activation_bytes=sum(_bytes(t) for address, t in saved.items() if address not in given),
        boundary_bytes=sum(_size(t) for t in tree_leaves(left.value) if isinstance(t, Tensor)),
        forward_peak=held.peak,
        backward_peak=backward_peak,
        kept_inputs={leaf: _bytes(saved[address]) for leaf, address in inputs.items() if address in saved},
        outputs={leaf: _bytes(t) for leaf, t in enumerate(tree_leaves(left.value)) if isinstance(t, Tensor)},
        kept_outputs=frozenset(leaf for leaf, address in outputs.items() if address in saved),
        stashes=[None if t is None else _stashed(t, saved, inputs, outputs) for t in left.skips],
        pops=[
            None if t is None else Popped(_address(t) in saved, gradients.get(place, Gradient()))
            for place, t in enumerate(start.skips)
        ],
    )
    return found, left


def _stashed(tensor: Tensor, saved: Container[int], inputs: Mapping[int, int], outputs: Mapping[int, int]) -> Stashed:
    address = _address(tensor)
    return Stashed(
        bytes=_size(tensor),
        address=address,
        kept=address in saved,
        inputs=frozenset(leaf for leaf, other in inputs.items() if other == address),
        outputs=frozenset(leaf for leaf, other in outputs.items() if other == address),
    )


def _backward(cell: Alone, entered: Passed, device: torch.device) -> tuple[int, dict[int, Gradient]]:
    """The most that is held, and the gradient of each popped tensor, by its place.

    As in a stage: while a cell goes backward, its output lives on only if autograd keeps it.
    """
    gradients: dict[int, Gradient] = {}
    with meter(device) as held:
        start = opened(entered)
        for place, tensor in enumerate(start.skips):
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(partial(_measured, gradients, place))
        left = cell(start)
        del start
        roots = [t for t in tree_leaves(left) if isinstance(t, Tensor) and t.requires_grad]
        edges = [get_gradient_edge(root) for root in roots]
        ones = [torch.ones_like(root) for root in roots]
        del left, roots
        held.restart()
        if edges:
            torch.autograd.backward(edges, ones)
    return held.peak, gradients


def _measured(gradients: dict[int, Gradient], place: int, gradient: Tensor) -> None:
    span = sum((n - 1) * stride for n, stride in zip(gradient.shape, gradient.stride(), strict=True)) + 1
    gradients[place] = Gradient(span * gradient.element_size() if gradient.numel() else 0, _bytes(gradient))


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


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
