"""What passes from a stage to the next: the leaves of a tree, cut from the graph of the stage that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gpipe.microbatch import refuse_hidden_tensors

Gradients = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One micro-batch between two stages.

    Attributes:
        leaves: Tensors without graph, and any other values.
        needs_grad: For each leaf whether a gradient is to flow back through it.
        spec: The structure that holds the leaves.
    """

    leaves: tuple[Any, ...]
    needs_grad: tuple[bool, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Any) -> Boundary:
        """Cut ``tree`` from its graph; the tensors share storage."""
        leaves, spec = tree_flatten(tree)
        for leaf in leaves:
            refuse_hidden_tensors(leaf, "a stage's output")
        return cls(
            tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves),
            tuple(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves),
            spec,
        )

    def map(self, function: Any) -> Boundary:
        """The same boundary with ``function`` applied to every tensor."""
        leaves = tuple(function(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)
        return Boundary(leaves, self.needs_grad, self.spec)

    def copy(self) -> Boundary:
        """The same values in storage of their own: what a stage writes to them nobody else sees."""
        return self.map(torch.clone)

    def versions(self) -> tuple[int, ...]:
        """A number per tensor that changes when it is written to."""
        return tuple(leaf._version for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference())

    def tree(self) -> Any:
        """The values, without graph."""
        return tree_unflatten(list(self.leaves), self.spec)

    def open(self, arrived: Gradients) -> Any:
        """The values as the start of a graph whose backward leaves their gradients, leaf by leaf, in ``arrived``.

        The tensors are no autograd leaves, so that a cell may write to them in place.
        """
        arrived[:] = [None] * len(self.leaves)
        places = [i for i, needed in enumerate(self.needs_grad) if needed]
        if not places or not torch.is_grad_enabled():
            return self.tree()
        leaves = list(self.leaves)
        opened = _Open.apply(arrived, places, _ANCHOR, *(leaves[i] for i in places))
        for i, tensor in zip(places, opened, strict=True):
            leaves[i] = tensor
        return tree_unflatten(leaves, self.spec)


_ANCHOR = torch.empty(0, requires_grad=True)  # makes autograd record a Function whose other inputs need no gradient


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, arrived: Gradients, places: Sequence[int], anchor: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.arrived, ctx.places = arrived, places
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        for i, gradient in zip(ctx.places, gradients, strict=True):
            ctx.arrived[i] = gradient
        return (None,) * (3 + len(gradients))
