"""A backward in two parts: the gradients of a stage's input first, those of its weights later, from one graph.

Most of a backward's time goes into products, two for each layer: one with the weight, for the input's gradient, and one
with the input, for the weight's. Only the first is waited for by the stage before. So the nodes of the graph that own
such products are run twice, each time for one of the two; everything else is run once, with the first part. Zero bubble
pipelines, arXiv 2401.10241, section 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_PRODUCTS = frozenset(
    f"{name}Backward0" for name in "Addbmm Addmm Addmv Baddbmm Bmm Mm Mv Linear Convolution Embedding".split()
)
_REENTRANT = "CheckpointFunctionBackward"  # runs a backward of its own, which may not be asked for some inputs alone


class CannotSplit(Exception):
    """The graph has a node that can only be run as a whole."""


@dataclass(frozen=True, slots=True)
class _Product:
    """A node whose weight product can wait."""

    node: Node
    parameters: list[Tensor]


class Split:
    """A recorded graph, ready for the first part of its backward, then for the second.

    Args:
        roots: Where gradients enter.
        start: A leaf that all inputs of the graph hang on: asking for its gradient makes backward reach them.

    Raises:
        CannotSplit: The graph cannot be run in parts.
    """

    def __init__(self, roots: Sequence[GradientEdge], start: Tensor) -> None:
        nodes, uses = _walked([root.node for root in roots])
        if any(node.name() == _REENTRANT for node in nodes):
            raise CannotSplit(f"torch.utils.checkpoint with use_reentrant=True ({_REENTRANT})")
        leaves: dict[Node, Tensor] = {node: node.variable for node in nodes if _is_leaf(node)}  # type: ignore[attr-defined]
        self._products = [
            _Product(node, [leaves[leaf] for leaf in weights])
            for node in nodes
            if node.name() in _PRODUCTS and (weights := list(_weights(node, uses)))
        ]
        later = {id(p) for product in self._products for p in product.parameters}
        self._start = start
        self._now = [p for p in leaves.values() if id(p) not in later and p is not start]
        self._entered: list[Tensor | None] = []

    def input_gradient(self, roots: Sequence[GradientEdge], values: Sequence[Tensor]) -> None:
        """Run backward from some of the roots up to the inputs; what the weight products need is kept."""
        edges = [GradientEdge(product.node, 0) for product in self._products]
        wanted: list[Any] = [*edges, *self._now, self._start]
        found = torch.autograd.grad(
            roots,
            wanted,
            values,
            retain_graph=True,
            allow_unused=True,
        )
        self._entered = list(found[: len(edges)])
        accumulated = [(p, g) for p, g in zip(self._now, found[len(edges) : -1], strict=True) if g is not None]
        if accumulated:
            parameters, gradients = zip(*accumulated, strict=True)
            torch.autograd.backward(parameters, gradients)

    def weight_gradient(self, keep_graph: bool) -> None:
        """Run the weight products; with ``keep_graph`` both parts can be run again."""
        entered, self._entered = self._entered, []
        for product, gradient in zip(self._products, entered, strict=True):
            if gradient is not None:
                edge = GradientEdge(product.node, 0)
                torch.autograd.backward([edge], [gradient], inputs=product.parameters, retain_graph=keep_graph)


def _walked(roots: Sequence[Node]) -> tuple[list[Node], Counter[Node]]:
    """All nodes of a graph, from the outputs on, and by how many edges each is reached."""
    nodes: dict[Node, None] = {}
    uses: Counter[Node] = Counter()
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        if node in nodes:
            continue
        nodes[node] = None
        following = [child for child, _ in node.next_functions if child is not None]
        uses.update(following)
        waiting += reversed(following)
    return list(nodes), uses


def _weights(node: Node, uses: Counter[Node]) -> Iterator[Node]:
    """The leaves of two or more dimensions that hang on ``node`` alone, by a path without branches.

    A bias is cheap, and goes with the first part: whether it is in the product's node may depend on the micro-batch's
    shape, and the order in which the gradients of micro-batches are added up must not.
    """
    for child, _ in node.next_functions:
        following: Any = child
        while following is not None and uses[following] == 1 and following.name() not in _PRODUCTS:
            if _is_leaf(following):
                if following.variable.dim() > 1:
                    yield following
                break
            after = [n for n, _ in following.next_functions if n is not None]
            following = after[0] if len(after) == 1 else None


def _is_leaf(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"
