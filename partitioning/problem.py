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
    activations: Ints
    workspace: Ints


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
        static: Bytes held all step long per byte of parameter.
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
    def _workspaces(self) -> list[Ints]:
        """Row j: the largest workspace of the 2**j cells from n on, so that any range is covered by two entries."""
        rows = [np.array([cell.workspace_bytes for cell in self.cells], dtype=np.int64)]
        while 2 ** len(rows) <= self.count:
            half = 2 ** (len(rows) - 1)
            rows.append(np.maximum(rows[-1][:-half], rows[-1][half:]))
        return rows

    @cached_property
    def uniform(self) -> bool:
        """Whether a stage's cost does not depend on which stage it is, links aside."""
        alike = len(set(self.limits)) == 1 and len(set(self.speeds)) == 1 and len(set(self.keep or (0,))) == 1
        return alike and self.schedule == "gpipe"

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

    def bytes(self, k: int, first: Ints, end: Ints, keep: Ints) -> StageBytes:
        """What stage ``k`` holds at its peak.

        GPipe reaches it when the last forward has ended: all inputs, the activations of the kept micro-batches, and
        the workspace of the first backward. They go backward first, so no recompute finds any of them still there, and
        a recompute needs the activations of one micro-batch: keeping one costs nothing. Under 1F1B the first
        micro-batches are kept, of which no more than are in flight exist at a time.
        """
        one = self.activations[end] - self.activations[first]
        kept = np.clip(keep, 1, self.in_flight(k))
        return StageBytes(
            static=np.ceil(self.static * (self.parameters[end] - self.parameters[first])).astype(np.int64),
            inputs=self.inputs_held(k) * self.entering[first],
            activations=kept * one,
            workspace=self._workspace(first, end),
        )

    def least_bytes(self, k: int, first: Ints, end: Ints) -> Ints:
        """Bytes stage ``k`` cannot do without: with the given keep, or with one micro-batch kept."""
        keep = np.asarray(1 if self.keep is None else self.keep[k])
        size = self.bytes(k, first, end, keep)
        total: Ints = size.static + size.inputs + size.activations + size.workspace
        return total

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
        one = self.activations[end] - self.activations[first]
        fitting = 1 + free // np.maximum(one, 1)
        return np.where(free < 0, -1, np.where((fitting >= self.in_flight(k)) | (one == 0), wanted, fitting))

    def _workspace(self, first: Ints, end: Ints) -> Ints:
        rows = self._workspaces
        if not rows[-1].any():
            return np.zeros((), dtype=np.int64)
        length = end - first
        level = np.frexp(length.astype(np.float64))[1] - 1
        left, right = np.broadcast_to(first, length.shape), end - (1 << level)
        largest = np.zeros(length.shape, dtype=np.int64)
        for j, row in enumerate(rows):
            here = level == j
            if here.any():
                largest[here] = np.maximum(row[left[here]], row[np.broadcast_to(right, length.shape)[here]])
        return largest

    def transit(self, k: int, first: Ints) -> tuple[Floats, Floats]:
        """Seconds a boundary takes into stage ``k``, and for how long it occupies the link."""
        zero = np.zeros(np.shape(first))
        if self.links is None or not 0 < k < self.stages:
            return zero, zero
        occupied = self.entering[first] / self.links[k - 1].bandwidth
        return occupied + self.links[k - 1].latency, occupied


def _seconds(values: Sequence[float]) -> Floats:
    return np.concatenate([np.zeros(1), np.cumsum(np.array(values, dtype=np.float64))])


def _bytes(values: Sequence[int]) -> Ints:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(values, dtype=np.int64))])
