"""A backward in two parts: the gradients of a stage's input first, those of its weights later, from one graph.

Most of a backward's time goes into products, two for each layer: one with the weight, for the input's gradient, and one
with the input, for the weight's. Only the first is waited for by the stage before. So the weight's products of matrix
products and convolutions are put off, and computed later as autograd would have; all else belongs to the first part,
after which the graph is freed: of the activations, the inputs of these layers stay, and the gradients of their outputs.
Zero bubble pipelines, arXiv 2401.10241, section 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_REENTRANT = "CheckpointFunctionBackward"  # runs a backward of its own, which may not be asked for some inputs alone


class CannotSplit(Exception):
    """The graph has a node that can only be run as a whole."""


@dataclass(slots=True)
class _Product:
    """A weight's product that is put off.

    Attributes:
        node: The layer's node in the graph.
        entry: Where the product's result goes on to the weight: it may have been transposed or cast.
        weight: The parameter.
        compute: The product, from the gradient of the layer's output.
    """

    node: Node
    entry: GradientEdge
    weight: Tensor
    compute: Callable[[Tensor], Tensor]


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
        self._products = [product for node in nodes for product in _put_off(node, uses)]
        later = {id(product.weight) for product in self._products}
        leaves = [node.variable for node in nodes if _is_leaf(node)]  # type: ignore[attr-defined]
        self._start = start
        self._now = [p for p in leaves if id(p) not in later and p is not start]
        self._waiting: list[tuple[Tensor, _Product]] = []

    def input_gradient(self, roots: Sequence[GradientEdge], values: Sequence[Tensor], keep_graph: bool) -> None:
        """Run backward from some of the roots up to the inputs; with ``keep_graph`` both parts can be run again."""
        edges = [GradientEdge(product.node, 0) for product in self._products]
        wanted: list[Any] = [*edges, *self._now, self._start]
        with _hooked([product.node for product in self._products]) as ran:
            found = torch.autograd.grad(roots, wanted, values, retain_graph=keep_graph, allow_unused=True)
        entered, now = found[: len(edges)], found[len(edges) : -1]
        pairs = [(ran.get(i, g), product) for i, (g, product) in enumerate(zip(entered, self._products, strict=True))]
        self._waiting = [(g, product) for g, product in pairs if g is not None]
        if not keep_graph:
            self._products = []
        for parameter, gradient in zip(self._now, now, strict=True):
            if gradient is not None:
                torch.autograd.backward([parameter], [gradient])

    def weight_gradient(self) -> None:
        """Run the products that were put off; each frees what it needed."""
        while self._waiting:
            gradient, product = self._waiting.pop(0)
            with torch.no_grad():
                result = product.compute(gradient)
            torch.autograd.backward([product.entry], [result], inputs=[product.weight], retain_graph=True)


@contextmanager
def _hooked(nodes: Sequence[Node]) -> Iterator[dict[int, Tensor | None]]:
    """By the number of a node, if it runs inside, the gradient that enters it, after the user's hooks.

    What ``autograd.grad`` finds at a node that runs is from before them.
    """
    ran: dict[int, Tensor | None] = {}

    def note(i: int, gradients: tuple[Tensor | None, ...]) -> None:
        ran[i] = gradients[0]

    hooks = [node.register_prehook(partial(note, i)) for i, node in enumerate(nodes)]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _put_off(node: Node, uses: Counter[Node]) -> Iterator[_Product]:
    """The product of a layer's weight, if the node is a layer's and the weight hangs on it alone."""
    if node.name() not in _LAYERS:
        return
    place, product_of = _LAYERS[node.name()]
    child, number = node.next_functions[place]
    leaf = _leaf_below(child, uses)
    if child is not None and leaf is not None:
        yield _Product(node, GradientEdge(child, number), leaf.variable, product_of(node))  # type: ignore[attr-defined]


def _leaf_below(child: Node | None, uses: Counter[Node]) -> Node | None:
    """The parameter's node that hangs on ``child`` alone, by a path without branches or layers, if there is one."""
    while child is not None and uses[child] == 1 and child.name() not in _LAYERS:
        if _is_leaf(child):
            return child
        after = [n for n, _ in child.next_functions if n is not None]
        child = after[0] if len(after) == 1 else None
    return None


def _matrix(saved: str, alpha: bool) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    """Products of ``mm`` and ``addmm`` with the second matrix, as autograd's ``mm_mat2_backward`` has them."""

    def product_of(node: Any) -> Callable[[Tensor], Tensor]:
        rows: Tensor = getattr(node, saved).detach()
        factor = node._saved_alpha if alpha else 1
        strides, sizes = node._saved_mat2_sym_strides, node._saved_mat2_sym_sizes
        by_column = strides[0] == 1 and strides[1] == sizes[0]

        def product(gradient: Tensor) -> Tensor:
            result = gradient.t().mm(rows.conj()).t() if by_column else rows.t().conj().mm(gradient)
            return result if factor == 1 else result * factor

        return product

    return product_of


def _convolution(node: Any) -> Callable[[Tensor], Tensor]:
    """The product of a convolution with its input."""
    image, weight = node._saved_input.detach(), node._saved_weight.detach()
    numbers = [
        getattr(node, f"_saved_{name}")
        for name in "bias_sym_sizes_opt stride padding dilation transposed output_padding groups".split()
    ]

    def product(gradient: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.convolution_backward(gradient, image, weight, *numbers, (False, True, False))[1]
        return result

    return product


_LAYERS: dict[str, tuple[int, Callable[[Any], Callable[[Tensor], Tensor]]]] = {
    "MmBackward0": (1, _matrix("_saved_self", alpha=False)),
    "AddmmBackward0": (2, _matrix("_saved_mat1", alpha=True)),
    "ConvolutionBackward0": (1, _convolution),
}


def _walked(roots: Sequence[Node]) -> tuple[list[Node], Counter[Node]]:
    """All nodes of a graph, from the outputs on, and by how many edges each is reached, outputs being reached too."""
    nodes: dict[Node, None] = {}
    uses = Counter(roots)
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


def _is_leaf(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"
