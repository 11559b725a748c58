"""What passes from a stage to the next: the leaves of a tree, cut from the graph of the stage that made them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gpipe.memory import copied, overlapping, version
from gpipe.microbatch import refuse_hidden_tensors

Gradients = list[Tensor | None]

_LEAF = tree_flatten(0)[1]


def leaves_once(tree: Any) -> tuple[list[Any], tuple[int, ...], TreeSpec]:
    """The leaves of ``tree``, an object that stands in several places once; for every place its leaf; the structure.

    A tensor that two places hold is one node of the graph: as two it would collect its gradient in another order, and
    a write to one would not be known to the other.
    """
    if type(tree) is Tensor:
        return [tree], (0,), _LEAF
    placed, spec = tree_flatten(tree)
    index: dict[int, int] = {}
    places = tuple(index.setdefault(id(leaf), len(index)) for leaf in placed)
    leaves: list[Any] = [None] * len(index)
    for leaf, place in zip(placed, places, strict=True):
        leaves[place] = leaf
    return leaves, places, spec


@dataclass(frozen=True, slots=True)
class Boundary:
    """One micro-batch between two stages.

    Attributes:
        leaves: Tensors without graph, and any other values, each once.
        needs_grad: For each leaf whether a gradient is to flow back through it.
        places: For each place of the structure the index of its leaf.
        spec: The structure that holds the leaves.
    """

    leaves: tuple[Any, ...]
    needs_grad: tuple[bool, ...]
    places: tuple[int, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Any) -> Boundary:
        """Cut ``tree`` from its graph; the tensors share storage."""
        return cls.cut(tree)[0]

    @classmethod
    def cut(cls, tree: Any) -> tuple[Boundary, list[Any]]:
        """The same, and the leaves as they were, with their graph."""
        leaves, places, spec = leaves_once(tree)
        values, needs_grad = [], []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                values.append(leaf.detach())
                needs_grad.append(leaf.requires_grad)
            else:
                refuse_hidden_tensors(leaf, "a stage's output")
                values.append(leaf)
                needs_grad.append(False)
        return cls(tuple(values), tuple(needs_grad), places, spec), leaves

    @classmethod
    def tuple_of(cls, parts: Sequence[Boundary]) -> Boundary:
        """One boundary whose tree is the tuple of those of ``parts``."""
        starts = [0, *accumulate(len(part.leaves) for part in parts)]
        numbered = tuple(
            part.tree(range(start, start + len(part.leaves))) for part, start in zip(parts, starts, strict=False)
        )
        places, spec = tree_flatten(numbered)
        return cls(
            tuple(chain.from_iterable(part.leaves for part in parts)),
            tuple(chain.from_iterable(part.needs_grad for part in parts)),
            tuple(places),
            spec,
        )

    def copy(self) -> Boundary:
        """The same values in storage of their own: what a stage writes to them nobody else sees."""
        return self.with_leaves(copied(self.leaves))

    def map(self, function: Callable[[Tensor], Tensor]) -> Boundary:
        """The same with ``function`` of every tensor."""
        return self.with_leaves(tuple(function(x) if isinstance(x, Tensor) else x for x in self.leaves))

    def with_leaves(self, leaves: tuple[Any, ...]) -> Boundary:
        """The same with other leaves in their places."""
        return Boundary(leaves, self.needs_grad, self.places, self.spec)

    def check_writes(self, versions: tuple[int, ...]) -> None:
        """Raise a RuntimeError if, since it had ``versions``, a tensor was written to that overlaps with another.

        Autograd knows what a write to a tensor does to its views, but across a boundary they are views no more.
        """
        if self.versions() != versions and overlapping(self.leaves):
            raise RuntimeError(
                "a stage modified in place a tensor that it receives together with a view of it, and gradients would "
                "be wrong: clone one of the two in the cell before, or do not work in place"
            )

    def versions(self) -> tuple[int, ...]:
        """A number per tensor that changes when it is written to."""
        return tuple(version(leaf) for leaf in self.leaves if isinstance(leaf, Tensor))

    def tree(self, leaves: Sequence[Any] | None = None) -> Any:
        """The values, without graph; or ``leaves`` in their places."""
        given = self.leaves if leaves is None else leaves
        return tree_unflatten([given[place] for place in self.places], self.spec)

    def open(self, arrived: Gradients, anchor: Tensor) -> Any:
        """The values as the start of a graph whose backward leaves their gradients, leaf by leaf, in ``arrived``.

        The tensors are no autograd leaves, so that a cell may write to them in place. They all hang on ``anchor``.
        """
        arrived[:] = [None] * len(self.leaves)
        places = [i for i, needed in enumerate(self.needs_grad) if needed]
        if not places or not torch.is_grad_enabled():
            return self.tree()
        leaves = list(self.leaves)
        opened = _Open.apply(arrived, places, anchor, *(leaves[i] for i in places))
        for i, tensor in zip(places, opened, strict=True):
            leaves[i] = tensor
        return self.tree(leaves)


def map_message(message: Boundary | Gradients, function: Callable[[Tensor], Tensor]) -> Boundary | Gradients:
    """What stages send each other, outputs or gradients, with ``function`` of every tensor."""
    if isinstance(message, Boundary):
        return message.map(function)
    return [None if gradient is None else function(gradient) for gradient in message]


def new_anchor() -> Tensor:
    """A leaf that makes autograd record a Function whose other inputs need no gradient.

    A fresh one each time: shared between threads, it is a lock that one holds while it waits for Python's, and the
    other the other way round (anomaly detection).
    """
    return torch.empty(0, requires_grad=True, device="cpu")


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
