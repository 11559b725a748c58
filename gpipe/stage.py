"""A stage: consecutive cells on one device, and what it does with one micro-batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gpipe.batchnorm import Statistics, deferred
from gpipe.boundary import Boundary, Gradients, new_anchor
from gpipe.buffers import Before, ChangingBuffers, rewound
from gpipe.partitioning.skips import carrying
from gpipe.phase import Phase, running
from gpipe.rng import Brought, Draws, cell_seed
from gpipe.split_backward import CannotSplit, Split
from gpipe.ways import StageCarrier, Ways, divided, in_own_memory, joined


class Head(Protocol):
    """Computes the loss of one micro-batch from the last stage's output, where the workers do that.

    Attributes:
        module: The loss as a module, if it is one.
    """

    module: nn.Module | None

    def __call__(self, micro_batch: int, output: Any) -> Tensor:
        """The micro-batch's share of the loss."""


class Stage:
    """Consecutive cells on one device.

    Args:
        index: Which stage of the pipeline this is.
        cells: Its cells with their names.
        first_cell: Index in the whole model of the first of them.
        device: Where they live.
        alone: Whether no other stage uses ``device``.
        ways: Values that skip stages on their way to or from this one.
    """

    def __init__(
        self,
        index: int,
        cells: Sequence[tuple[str, nn.Module]],
        first_cell: int,
        device: torch.device,
        alone: bool,
        ways: Ways = Ways(),  # noqa: B008
    ) -> None:
        self.index = index
        self.cells = tuple(cell for _, cell in cells)
        self.names = tuple(name for name, _ in cells)
        self.first_cell = first_cell
        self.device = device
        self.ways = ways
        self.draws = Draws(len(cells) + 1, device, alone)
        self.buffers = ChangingBuffers()
        self._warned = False

    @property
    def parameter_bytes(self) -> int:
        """Bytes of its parameters, each counted once."""
        return sum(p.nbytes for p in {p: None for cell in self.cells for p in cell.parameters()})

    def warn_once(self, message: str) -> None:
        """Tell the user something that every micro-batch would say again."""
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=2)

    def __str__(self) -> str:
        last = self.first_cell + len(self.cells) - 1
        return f"stage {self.index} (cells {self.first_cell} to {last}, {self.device})"


@dataclass(slots=True)
class _Graph:
    """The recorded forward of one micro-batch, ready to go backward."""

    roots: list[tuple[tuple[int, int], GradientEdge]]  # (part, leaf), where its gradient enters: holds no output
    arrived: Gradients  # filled by backward: a gradient for every leaf of the input
    anchor: Tensor  # the leaf that all inputs hang on
    sizes: list[int]  # how many leaves every part of the input has
    split: Split | None = None  # made by the first part of a backward in two

    def leaving(self) -> list[Gradients]:
        """What arrived, for every part of the input."""
        return divided(self.arrived, self.sizes)

    def entering(self, gradients: Sequence[Gradients]) -> tuple[list[GradientEdge], list[Tensor]]:
        """Where a backward begins, and with what; what the last one left is forgotten."""
        self.arrived[:] = [None] * len(self.arrived)
        pairs = [(root, g) for (part, i), root in self.roots if (g := gradients[part][i]) is not None]
        return [root for root, _ in pairs], [gradient for _, gradient in pairs]


@dataclass(slots=True)
class _First:
    """What is to be known of a forward that will be repeated."""

    before: Before
    outputs: tuple[torch.Size | None, ...]  # for every leaf its shape, if it needs a gradient


@dataclass(slots=True)
class _Kept:
    """The boundary of a micro-batch whose activations were dropped."""

    boundary: Boundary
    sizes: list[int]
    versions: tuple[int, ...]


@dataclass
class Flight:
    """The micro-batches of one mini-batch on their way through one stage.

    Attributes:
        stage: The stage.
        seed, step: What random draws depend on, beside micro-batch and cell.
        first_micro_batch: The number, for random draws, of micro-batch 0.
        recomputed: Micro-batches whose activations are dropped and recomputed.
        statistics: Where deferred batch-norm layers collect, None if they are not deferred.
        head: Computes the loss of one micro-batch from the last stage's output, where the workers do that.
        two_pass: Every forward comes twice: first without any backward to follow, then as its repetition.
        keep_graph: Backward may come again (``retain_graph=True``).
    """

    stage: Stage
    seed: int
    step: int
    first_micro_batch: int = 0
    recomputed: frozenset[int] = frozenset()
    statistics: Statistics | None = None
    head: Head | None = None
    two_pass: bool = False
    keep_graph: bool = False
    _running: int | None = None
    _graphs: dict[int, _Graph] = field(default_factory=dict)
    _first: dict[int, _First] = field(default_factory=dict)
    _kept: dict[int, _Kept] = field(default_factory=dict)
    _brought: dict[tuple[int, int], Brought] = field(default_factory=dict)
    _observed: bool = False

    def forward(self, m: int, parts: Sequence[Boundary]) -> list[Boundary]:
        """Run micro-batch ``m`` through the cells; without a graph if it will be recomputed or comes again.

        Args:
            m: The micro-batch.
            parts: What comes from the stage before, and from those further back.

        Returns:
            What goes to the next stage, and to those further on.
        """
        boundary, sizes = joined(parts), [len(part.leaves) for part in parts]
        if not torch.is_grad_enabled():
            left = self._run(Phase(m, statistics=self.statistics), boundary.tree())
            return in_own_memory([Boundary.of(part) for part in left])
        if self.two_pass and m not in self._first:
            return self._run_first(m, boundary, sizes)
        if m in self.recomputed:
            return self._forward_dropping(m, boundary, sizes)
        if self.two_pass:
            self._graphs[m], outputs = self._repeat(m, boundary, sizes)
            self._forget(m)
        else:
            self._graphs[m], outputs = self._record(Phase(m, statistics=self.statistics), boundary, sizes)
        return outputs

    def _forward_dropping(self, m: int, boundary: Boundary, sizes: list[int]) -> list[Boundary]:
        """Forward that keeps the boundary alone."""
        versions = boundary.versions()
        if m in self._first:
            _, outputs = self._repeat(m, boundary.copy(), sizes, checkpointing=True)
        else:
            outputs = self._run_first(m, boundary.copy(), sizes)
        self._kept[m] = _Kept(boundary, sizes, versions)
        return outputs

    def recompute(self, m: int) -> None:
        """Run micro-batch ``m`` forward again, recording the graph this time."""
        kept = self._kept[m] if self.keep_graph else self._kept.pop(m)
        if not any(shape is not None for shape in self._first[m].outputs):
            self._graphs[m] = _Graph([], [None] * len(kept.boundary.leaves), new_anchor(), kept.sizes)
        else:
            if kept.boundary.versions() != kept.versions:
                raise RuntimeError(
                    "a tensor that is needed to recompute this micro-batch was modified in place after forward used "
                    "it: modify a clone, or wrap with checkpoint='never'"
                )
            boundary = kept.boundary.copy() if self.keep_graph else kept.boundary
            self._graphs[m], _ = self._repeat(m, boundary, kept.sizes)
        self._forget(m)

    def _run_first(self, m: int, boundary: Boundary, sizes: list[int]) -> list[Boundary]:
        """Forward of which nothing is kept but what its repetition has to know.

        A graph is recorded, and let go at the end. Under ``no_grad`` nobody would know which outputs need a gradient,
        and some operators would take another path than in the repetition.
        """
        phase = Phase(m, checkpointing=True, statistics=self.statistics)
        with self.stage.buffers.watched(self._watched) as before:
            _, outputs = self._record(phase, boundary, sizes)
        self._first[m] = _First(before, _expected(outputs))
        return outputs

    def _repeat(
        self, m: int, boundary: Boundary, sizes: list[int], checkpointing: bool = False
    ) -> tuple[_Graph, list[Boundary]]:
        """Forward from what the first one started from: the same draws and buffers, and no traces of its own."""
        first = self._first[m]
        phase = Phase(m, checkpointing=checkpointing, recomputing=True, statistics=self.statistics)
        with rewound(first.before):
            graph, outputs = self._record(phase, boundary, sizes)
        if (found := _expected(outputs)) != first.outputs:
            raise RuntimeError(
                "the recompute gave other outputs than forward did (shapes of the leaves, None for those that need no "
                f"gradient: {_shown(found)}, forward {_shown(first.outputs)}): a cell must compute the same both times"
            )
        return graph, outputs

    def _forget(self, m: int) -> None:
        """Let go of what repetitions of micro-batch ``m`` had to know, after the last of them."""
        if not self.keep_graph:
            del self._first[m]

    def backward(self, m: int, gradients: Sequence[Gradients]) -> list[Gradients]:
        """Run micro-batch ``m`` backward; parameter gradients accumulate in ``parameter.grad``.

        Args:
            m: The micro-batch.
            gradients: For every part of the stage's output one for every leaf, None where none came.

        Returns:
            For every part of the stage's input one for every leaf.
        """
        lasting = self._lasting(m)
        graph = self._graphs[m] if lasting else self._graphs.pop(m)
        roots, values = graph.entering(gradients)
        if not lasting:
            graph.roots.clear()
        if roots:
            torch.autograd.backward(roots, values, retain_graph=lasting)
        return graph.leaving()

    def input_gradient(self, m: int, gradients: Sequence[Gradients]) -> list[Gradients]:
        """The first part of ``backward``; the weights' gradients are left to ``weight_gradient``.

        Where the graph cannot be run in two parts, this is all of it.
        """
        graph = self._graphs[m]
        try:
            graph.split = graph.split or Split([root for _, root in graph.roots], graph.anchor)
        except CannotSplit as error:
            self.stage.warn_once(f"{self.stage} runs its backward whole, not in two parts: it uses {error}")
            return self.backward(m, gradients)
        lasting = self._lasting(m)
        roots, values = graph.entering(gradients)
        if not lasting:
            graph.roots.clear()
        if roots:
            graph.split.input_gradient(roots, values, lasting)
        return graph.leaving()

    def weight_gradient(self, m: int) -> None:
        """The second part of ``backward``."""
        lasting = self._lasting(m)
        graph = self._graphs.get(m) if lasting else self._graphs.pop(m, None)
        if graph is not None and graph.split is not None:
            graph.split.weight_gradient()

    def _lasting(self, m: int) -> bool:
        """Whether the graph of a micro-batch is to outlive its backward."""
        return self.keep_graph and m not in self.recomputed and not self.two_pass

    def _record(self, phase: Phase, boundary: Boundary, sizes: list[int]) -> tuple[_Graph, list[Boundary]]:
        arrived: Gradients = []
        anchor = new_anchor()
        versions = boundary.versions()
        left = self._run(phase, boundary.open(arrived, anchor))
        boundary.check_writes(versions)
        cuts = [Boundary.cut(part) for part in left]
        roots = [
            ((n, i), get_gradient_edge(leaf))
            for n, (output, leaves) in enumerate(cuts)
            for i, (leaf, needed) in enumerate(zip(leaves, output.needs_grad, strict=True))
            if needed
        ]
        return _Graph(roots, arrived, anchor, sizes), in_own_memory([output for output, _ in cuts])

    def _run(self, phase: Phase, entered: Any) -> list[Any]:
        """Run the cells; gives what leaves the stage, on every way."""
        stage = self.stage
        value, *arrived = entered if stage.ways.incoming else (entered,)
        carrier = StageCarrier(stage.ways, arrived)
        with running(phase), carrying(carrier):
            for i, cell in enumerate(stage.cells):
                self._running = i
                with self._drawing(i, phase):
                    value = cell(value)
            if self.head is not None:
                self._running = len(stage.cells)
                with self._drawing(self._running, phase):
                    value = self.head(phase.micro_batch, value)
        self._running = None
        self._observed = True
        return [value, *carrier.bundles()]

    @property
    def cell(self) -> str | None:
        """What runs in words, None between actions."""
        if self._running is None:
            return None
        if self._running == len(self.stage.cells):
            return "loss_fn"
        return f"{self.stage.names[self._running]} ({type(self.stage.cells[self._running]).__name__})"

    def _drawing(self, cell: int, phase: Phase) -> AbstractContextManager[None]:
        """A scope to run a cell in, or, as the last, the head."""
        draws, observe, m = self.stage.draws, not self._observed, phase.micro_batch
        if not (observe or draws.may_draw(cell)):
            return _NOTHING
        seed = cell_seed(self.seed, self.step, self.first_micro_batch + m, self.stage.first_cell + cell)
        return draws.cell(cell, seed, observe, self._generators(m, cell), phase.recomputing)

    def _generators(self, m: int, cell: int) -> Brought:
        """Where the states of the generators a cell brings are kept for its repetition."""
        return self._brought.setdefault((m, cell), {}) if self.two_pass or m in self.recomputed else {}

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules that forward runs."""
        heads = [self.head.module] if self.head and self.head.module else []
        return [m for module in (*self.stage.cells, *heads) for m in module.modules()]

    @cached_property
    def _watched(self) -> list[nn.Module]:
        """Those whose buffers a recompute would change again."""
        return [m for m in self.modules if self.statistics is None or not deferred(m)]


_NOTHING = nullcontext()


def _expected(outputs: Sequence[Boundary]) -> tuple[torch.Size | None, ...]:
    """For every leaf its shape, if it needs a gradient."""
    pairs = (pair for part in outputs for pair in zip(part.leaves, part.needs_grad, strict=True))
    return tuple(leaf.shape if needed else None for leaf, needed in pairs)


def _shown(expected: tuple[torch.Size | None, ...]) -> list[tuple[int, ...] | None]:
    return [shape if shape is None else tuple(shape) for shape in expected]
