"""What is to be divided, and over what: a chain of cells, devices and links, as running totals.

Stages are numbered k = 0..K-1 from the model's input; a stage is given by its first cell and by the cell after its
last, ``first`` and ``end``. Both may be arrays of any shape: everything here is computed for all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.skip_totals import SkipTotals

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ScheduleName = Literal["gpipe", "1f1b"]

NO_LIMIT = 2**62
"""Bytes of a device whose memory is not limited."""


class Link(NamedTuple):
    """How long a message takes from one stage to the next: latency + bytes / bandwidth; both directions alike.

    Attributes:
        latency: Seconds before the first byte arrives.
        bandwidth: Bytes per second.
    """

    latency: float
    bandwidth: float


class StageTimes(NamedTuple):
    """Seconds of one micro-batch on a stage, and how many micro-batches it keeps; keep is -1 where it does not fit."""

    forward: Floats
    backward: Floats
    keep: Ints


class StageBytes(NamedTuple):
    """What a stage's peak is made of, in bytes."""

    static: Ints
    inputs: Ints
    outputs: Ints
    activations: Ints
    workspace: Ints

    @property
    def total(self) -> Ints:
        """Their sum."""
        return self.static + self.inputs + self.outputs + self.activations + self.workspace


@dataclass(frozen=True, eq=False)
class Problem:
    """A chain of cells to be divided into K stages that run M micro-batches.

    Attributes:
        cells: Their costs for one micro-batch.
        input_bytes: One micro-batch of the model's input.
        stages: K.
        micro_batches: M.
        schedule: The order of forward and backward.
        limits: Bytes of every stage's device, ``NO_LIMIT`` where there is none.
        keep: Micro-batches every stage keeps; None for as many as fit.
        static: Bytes held per byte of parameter once backward has made gradients, them included.
        speeds: Relative speed of every stage's device.
        links: The link into stage k at k - 1; None if messages take no time.
    """

    cells: Sequence[CellCost]
    input_bytes: int
    stages: int
    micro_batches: int
    schedule: ScheduleName
    limits: tuple[int, ...]
    keep: tuple[int, ...] | None
    static: float
    speeds: tuple[float, ...]
    links: tuple[Link, ...] | None

    @cached_property
    def count(self) -> int:
        """Number of cells N."""
        return len(self.cells)

    @cached_property
    def forward(self) -> Floats:
        """Forward seconds at speed 1 of the first n cells, n = 0..N."""
        return _seconds([cell.forward_seconds for cell in self.cells])

    @cached_property
    def backward(self) -> Floats:
        """Backward seconds at speed 1 of the first n cells."""
        return _seconds([cell.backward_seconds for cell in self.cells])

    @cached_property
    def work(self) -> Floats:
        """Forward and backward seconds of the first n cells on the fastest device: no division is quicker."""
        total: Floats = (self.forward + self.backward) / max(self.speeds)
        return total

    @cached_property
    def activations(self) -> Ints:
        """Activation bytes of the first n cells."""
        return _bytes([cell.activation_bytes for cell in self.cells])

    @cached_property
    def parameters(self) -> Ints:
        """Parameter bytes of the first n cells."""
        return _bytes([cell.parameter_bytes for cell in self.cells])

    @cached_property
    def entering(self) -> Ints:
        """Bytes of one micro-batch that enter a stage whose first cell is n, n = 0..N-1."""
        return np.array([self.input_bytes, *(cell.boundary_bytes for cell in self.cells[:-1])], dtype=np.int64)

    @cached_property
    def skips(self) -> SkipTotals | None:
        """What skips cells; None where nothing does."""
        return SkipTotals(self.cells) if any(cell.skips for cell in self.cells) else None

    @property
    def _outputs(self) -> int:
        """Bytes of the model's outputs for the mini-batch, and of their gradients."""
        return 2 * self.micro_batches * self.cells[-1].boundary_bytes

    @cached_property
    def kept_input(self) -> Ints:
        """What autograd keeps of that, if the stage does not recompute."""
        kept = [c.kept_input_bytes for c in self.cells]
        pairs = zip(kept, self.entering.tolist(), strict=True)
        return np.array([e if k is None else min(k, e) for k, e in pairs], dtype=np.int64)

    @cached_property
    def handed_on(self) -> Ints:
        """Bytes of every cell's activations that are kept for the next cell alone."""
        return np.array([min(c.handed_on_bytes, c.activation_bytes) for c in self.cells], dtype=np.int64)

    @cached_property
    def _running(self) -> RangeMaximum:
        """Bytes of every cell while it runs, of what passes over it, and of the activations of all cells up to it."""
        workspaces = np.array([cell.workspace_bytes for cell in self.cells], dtype=np.int64)
        passing = 0 if self.skips is None else self.skips.passing
        return RangeMaximum(self.activations[1:] + workspaces + passing)

    @cached_property
    def _running_first(self) -> RangeMaximum:
        """The same in the first backward, with the gradients that may be there by then: its own, the later cells'."""
        return RangeMaximum(self._running.values - self.parameters[:-1])

    @cached_property
    def uniform(self) -> bool:
        """Whether a stage's cost does not depend on which stage it is, links aside."""
        alike = len(set(self.limits)) == 1 and len(set(self.speeds)) == 1 and len(set(self.keep or (0,))) == 1
        return alike and self.schedule == "gpipe"

    @property
    def least_keep(self) -> int:
        """The most micro-batches to keep that take no more memory than keeping none."""
        return 1 if self.schedule == "gpipe" else 0

    def in_flight(self, k: int) -> int:
        """Micro-batches stage ``k`` has sent forward and not yet backward, at most."""
        return self.micro_batches if self.schedule == "gpipe" else min(self.stages - k, self.micro_batches)

    def inputs_held(self, k: int) -> int:
        """Inputs that lie on stage ``k``'s device at most, whether their activations are kept or not.

        Under 1F1B one more than are in flight may have arrived; the first stage is given all inputs at once.
        """
        if self.schedule == "gpipe" or k == 0:
            return self.micro_batches
        return min(self.stages - k + 1, self.micro_batches)

    @property
    def skips_held(self) -> int:
        """Values of one name that wait on the device of the stage that pops it at most, from whichever stage."""
        return self.in_flight(0)

    def bytes(self, k: int, first: Ints, end: Ints, keep: Ints) -> StageBytes:
        """What stage ``k`` holds at its peak.

        GPipe reaches it when the last forward has ended: all inputs, the activations of the kept micro-batches, and
        the workspace of the first backward. They go backward first, so no recompute finds any of them still there, and
        a recompute needs the activations of one micro-batch: keeping one costs nothing. A further one trades its input,
        or what of it autograd does not keep, for its activations. The parameters' gradients are made by the first
        backward, when its activations and input go. Under 1F1B the first micro-batches are kept, of which
        no more than are in flight exist at a time, and beside them those of a forward that runs and drops them.

        The last stage holds the whole mini-batch's outputs and their gradients, unless 1F1B has every micro-batch's
        loss computed there and then.

        A value that skips stages lies where it is popped, as a part of that stage's input which may come early. Within
        a stage it belongs to its graph; while cells run that it passes over, it, or its gradient, waits.
        """
        one = self._one(first, end)
        skipped = 0 if self.skips is None else self.skips.entering(first, end)
        more = np.clip(self._at_once(keep), 1, self.in_flight(k)) - 1
        further = np.where(more > 0, self.further_bytes(first, end), 0)
        static = np.ceil(self.static * (self.parameters[end] - self.parameters[first])).astype(np.int64)
        traded = np.minimum(one, self._let_go(first, end))
        return StageBytes(
            static=static - self._pending(k, first, end, further),
            inputs=self.inputs_held(k) * self.entering[first] + self.skips_held * skipped - more * traded,
            outputs=np.where((self.schedule == "gpipe") & (end == self.count), self._outputs, 0),
            activations=(1 + more) * one,
            workspace=self._workspace(first, end),
        )

    def least_bytes(self, k: int, first: Ints, end: Ints) -> Ints:
        """Bytes stage ``k`` cannot do without: with the given keep, or with one micro-batch kept."""
        keep = np.asarray(self.least_keep if self.keep is None else self.keep[k])
        return self.bytes(k, first, end, keep).total

    def stage(self, k: int, first: Ints, end: Ints) -> StageTimes:
        """Seconds and keep of stage ``k`` with the cells ``first`` to ``end`` - 1; 0 <= first < end <= N."""
        forward = (self.forward[end] - self.forward[first]) / self.speeds[k]
        backward = (self.backward[end] - self.backward[first]) / self.speeds[k]
        return StageTimes(forward, backward, self._keep(k, first, end))

    def _keep(self, k: int, first: Ints, end: Ints) -> Ints:
        wanted = self.micro_batches if self.keep is None else self.keep[k]
        if self.limits[k] >= NO_LIMIT:
            return np.full(np.broadcast_shapes(np.shape(first), np.shape(end)), wanted, dtype=np.int64)
        free = self.limits[k] - self.least_bytes(k, first, end)
        if self.keep is not None:
            return np.where(free >= 0, wanted, -1)
        further = self.further_bytes(first, end)
        gained = self._pending(k, first, end, further) - self._pending(k, first, end, np.zeros_like(further))
        fitting = 1 + (free + gained) // np.maximum(further, 1)
        some = fitting if self.schedule == "gpipe" else fitting - 1
        return np.where(free < 0, -1, np.where((fitting >= self.in_flight(k)) | (further == 0), wanted, some))

    def _at_once(self, keep: Ints) -> Ints:
        """Micro-batches whose activations exist at once, up to those in flight.

        Under 1F1B the kept ones come first, and a forward that drops its activations has them while it runs.
        """
        return keep if self.schedule == "gpipe" else np.where(keep > 0, keep + 1, keep)

    def further_bytes(self, first: Ints, end: Ints) -> Ints:
        """What every kept micro-batch but the first adds to the peak of a stage."""
        further: Ints = np.maximum(self._one(first, end) - self._let_go(first, end), 0)
        return further

    def _entering(self, first: Ints, end: Ints) -> Ints:
        """Bytes of one micro-batch that enter a stage, from the one before it and from those further back."""
        boundary: Ints = self.entering[first]
        return boundary if self.skips is None else boundary + self.skips.entering(first, end)

    def _let_go(self, first: Ints, end: Ints) -> Ints:
        """What of that autograd does not keep, if the stage does not recompute."""
        boundary: Ints = self.entering[first] - self.kept_input[first]
        return boundary if self.skips is None else boundary + self.skips.let_go(first, end)

    def _one(self, first: Ints, end: Ints) -> Ints:
        """Activations of one micro-batch; the output, if only the next stage's cell wants it, is not among them."""
        one = self._of_cells(first, end)
        return one if self.skips is None else one + self.skips.handed_on(first, end)

    def _of_cells(self, first: Ints, end: Ints) -> Ints:
        """The same without what only the graphs of cells further on keep."""
        own: Ints = self.activations[end] - self.activations[first] - self.handed_on[end - 1]
        return own

    def _workspace(self, first: Ints, end: Ints) -> Ints:
        """Beyond all activations: a cell's workspace is needed while those of the cells after it are not there."""
        most = self._running(first, end) - self.activations[first]
        if self.skips is not None:
            most = most - self.skips.over(first, end)
        beyond: Ints = np.maximum(most - self._of_cells(first, end), 0)
        return beyond

    def _pending(self, k: int, first: Ints, end: Ints, further: Ints) -> Ints:
        """How much less a stage holds because the first backward has yet to make the gradients.

        Args:
            k: The stage.
            first: Its first cell.
            end: The cell after its last.
            further: What the second backward has less than the first, beside an input.
        """
        if self.schedule != "gpipe" or self.static < 2:
            return np.zeros((), dtype=np.int64)
        gradients = self.parameters[end] - self.parameters[first]
        first_backward = self._running_first(first, end) + self.parameters[end]
        pending: Ints = self._running(first, end) + gradients - first_backward
        if self.micro_batches == 1:
            return pending
        least: Ints = np.minimum(pending, self._entering(first, end) + further)
        return least

    def transit(self, k: int, first: Ints) -> tuple[Floats, Floats]:
        """Seconds a message takes into stage ``k``, and for how long it occupies the link.

        A value that skips stages goes over the links of all stages on its way, with their boundaries.
        """
        zero = np.zeros(np.shape(first))
        if self.links is None or not 0 < k < self.stages:
            return zero, zero
        size = self.entering[first] if self.skips is None else self.entering[first] + self.skips.crossing[first]
        occupied = size / self.links[k - 1].bandwidth
        return occupied + self.links[k - 1].latency, occupied


class RangeMaximum:
    """The largest of any range of some numbers, by two look-ups: row j holds the largest of 2**j from each place on."""

    def __init__(self, values: Ints) -> None:
        self.values = values
        rows = [values]
        while 2 ** len(rows) <= len(values):
            half = 2 ** (len(rows) - 1)
            rows.append(rows[-1].copy())
            np.maximum(rows[-2][:-half], rows[-2][half:], out=rows[-1][:-half])
        self._rows = np.stack(rows)

    def __call__(self, first: Ints, end: Ints) -> Ints:
        """The largest from ``first`` to ``end`` - 1, for all of them at once."""
        level = np.frexp((end - first).astype(np.float64))[1] - 1
        largest: Ints = np.maximum(self._rows[level, first], self._rows[level, end - (1 << level)])
        return largest


def _seconds(values: Sequence[float]) -> Floats:
    return np.concatenate([np.zeros(1), np.cumsum(np.array(values, dtype=np.float64))])


def _bytes(values: Sequence[int]) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(values, dtype=np.int64))])
