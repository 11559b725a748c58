"""What must be remembered of the last stages of a division to continue it to the front, and how good it can become.

A label is a row of seconds that belongs to a division of the last cells into the last stages. Putting a stage in front
gives another label. Of two labels for the same cells and stages, one that is nowhere larger is as good in every
continuation. ``Floor`` holds, per number of stages and cells still missing in front, the least those can add.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from gpipe.partitioning.makespan import passed
from gpipe.partitioning.problem import Floats, Ints, Problem, StageTimes


class Floor(NamedTuple):
    """Lower bounds over all divisions of the first n cells into k stages, for some n.

    Attributes:
        added: Seconds every path through these stages takes. Shape (n,).
        worst: Per bottleneck the least the worst of these stages has. Shape (bottlenecks, n).
    """

    added: Floats
    worst: Floats


class Labels(Protocol):
    """The labels of one schedule. K stages, M micro-batches; ``times`` are those of stages that fit."""

    dominance: bool
    """Whether a label that is nowhere larger makes another superfluous; if not, labels only rank divisions."""

    def score(self, k: int, first: Ints, end: Ints) -> Floats:
        """No division with this stage takes fewer seconds; infinite if the stage does not fit."""

    def longest(self, seconds: float) -> Floats:
        """For every first cell the work beyond which a stage is in no division of fewer seconds. Shape (N,)."""

    def part(self, k: int, first: Ints, end: Ints) -> Floor:
        """What stage ``k`` alone adds to a floor; infinite if it does not fit."""

    def link(self, k: int, first: Ints) -> Floor:
        """What the link into stage ``k`` alone adds to a floor."""

    def start(self) -> Floats:
        """The label of no stage at all. Shape (1, width)."""

    def extend(self, k: int, ends: Ints, times: StageTimes, labels: Floats) -> Floats:
        """Put stage ``k`` in front. Shapes: ``ends`` and times (n,), labels (n, width)."""

    def bound(self, labels: Floats, floor: Floor) -> Floats:
        """No continuation takes fewer seconds. ``floor`` is that of one n."""


class GPipeLabels:
    """Labels of GPipe: the forward's pace, and when the backward of some micro-batches has left the last stages.

    The step is a longest path: forward through all stages at the pace of the slowest, then backward. A backward path
    moves on in micro-batches on whichever stage is slowest, but never to a later stage; its length is followed at the
    micro-batches of ``grid`` (in the order in which they go backward), which is exact if every stage changes its pace,
    from kept to recomputed micro-batches, at one of them, and a little less than the length if not.

    Args:
        problem: The chain and its devices.
        grid: Increasing, from 0 to M - 1.
        added: Seconds that any division spends outside the slowest stages.
    """

    def __init__(self, problem: Problem, grid: Ints, added: float) -> None:
        # a stage that keeps nothing may begin its recompute before the last stage does: not followed, and felt only
        # where few micro-batches let a stage be as long as all stages behind it
        self.dominance = problem.micro_batches > 4 or 0 not in (problem.keep or ())
        self._problem, self._grid, self._added = problem, grid, added
        self._moves = problem.micro_batches - 1

    def score(self, k: int, first: Ints, end: Ints) -> Floats:
        """The seconds of a step if this stage were the slowest both ways."""
        times = self._problem.stage(k, first, end)
        pace = times.forward * self._moves + self._pace(times, np.array([self._moves]))[..., 0]
        return np.where(times.keep >= 0, self._added + pace, np.inf)

    def longest(self, seconds: float) -> Floats:
        """As the stage may be the slowest both ways."""
        left = (seconds - self._added) / self._moves if self._moves else np.inf
        return np.full(self._problem.count, left)

    def part(self, k: int, first: Ints, end: Ints) -> Floor:
        """Bottlenecks: the whole forward, and the backward from every point of the grid to its end."""
        times = self._problem.stage(k, first, end)
        pace = np.moveaxis(self._pace(times, self._grid), -1, 0)
        worst = np.concatenate([self._moves * times.forward[None], pace[-1] - pace])
        return Floor(
            np.where(times.keep >= 0, times.forward + times.backward, np.inf),
            np.where(times.keep >= 0, worst, np.inf),
        )

    def link(self, k: int, first: Ints) -> Floor:
        """A link is passed both ways and may be the slowest of all."""
        transit, occupied = self._problem.transit(k, first)
        rest = np.concatenate([[self._moves], self._moves - self._grid])
        return Floor(2 * transit, np.multiply.outer(rest, occupied))

    def start(self) -> Floats:
        """Gradients of all micro-batches arrive at the last stage at once."""
        return np.zeros((1, 1 + len(self._grid)))

    def extend(self, k: int, ends: Ints, times: StageTimes, labels: Floats) -> Floats:
        """A micro-batch leaves the link into the stage before, then the stage."""
        transit, occupied = self._problem.transit(k + 1, ends)
        slowest = np.maximum(labels[:, 0], self._moves * np.maximum(times.forward, occupied))
        time = labels[:, 1:]
        if self._problem.links is not None:
            time = passed(time, np.multiply.outer(occupied, self._grid)) + 2 * transit[:, None]
        if k == self._problem.stages - 1:
            time = time + np.where(times.keep == 0, times.forward, 0)[:, None]
        time = passed(time, self._pace(times, self._grid)) + (times.forward + times.backward)[:, None]
        return np.concatenate([slowest[:, None], time], axis=1)

    def bound(self, labels: Floats, floor: Floor) -> Floats:
        """The slowest forward, and the longest path that moves on to one more stage."""
        backward = (labels[:, 1:] + floor.worst[1:, 0]).max(axis=1) + floor.added[0]
        seconds: Floats = np.maximum(labels[:, 0], floor.worst[0, 0]) + backward
        return seconds

    def _pace(self, times: StageTimes, grid: Ints) -> Floats:
        """Seconds from the end of the first backward to that of those in ``grid``, which becomes the last axis."""
        recomputed = np.maximum(grid - np.maximum(times.keep - 1, 0)[..., None], 0)
        pace: Floats = times.backward[..., None] * grid + times.forward[..., None] * recomputed
        return pace


class OneFOneBLabels:
    """Labels of 1F1B: seconds through the last stages and back, and a lower bound of the step among them.

    Stage k is busy with M micro-batches, begins when the first has come through the stages before it, and ends before
    the last gradient goes back through them. Between its first min(K - k, M) forwards and the first gradient it waits
    for the stages behind it, and once more at the end. The largest of these sums is the step, or little less than it.

    Args:
        problem: The chain and its devices.
    """

    dominance = False

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def score(self, k: int, first: Ints, end: Ints) -> Floats:
        """Seconds before, within and behind the stage, were all others on the fastest device."""
        times = self._problem.stage(k, first, end)
        behind = self._problem.work[-1] - self._problem.work[end]
        seconds = self._problem.work[first] + self._own(k, times, behind)
        return np.where(times.keep >= 0, seconds, np.inf)

    def longest(self, seconds: float) -> Floats:
        """As the stage is busy with all micro-batches once the first has reached it."""
        work: Floats = (seconds - self._problem.work[:-1]) / self._problem.micro_batches
        return work

    def part(self, k: int, first: Ints, end: Ints) -> Floor:
        """The way through the stage and back, and the bound it sets."""
        times = self._problem.stage(k, first, end)
        added = np.where(times.keep >= 0, times.forward + times.backward, np.inf)
        return Floor(added, self.score(k, first, end)[None])

    def link(self, k: int, first: Ints) -> Floor:
        """A link is passed both ways."""
        transit, _ = self._problem.transit(k, first)
        return Floor(2 * transit, np.zeros((1, *np.shape(first))))

    def start(self) -> Floats:
        """Nothing to pass, no bound."""
        return np.zeros((1, 2))

    def extend(self, k: int, ends: Ints, times: StageTimes, labels: Floats) -> Floats:
        """All that is behind the stage is now further away, and the stage sets a bound of its own."""
        transit, _ = self._problem.transit(k + 1, ends)
        behind = labels[:, 0] + 2 * transit
        through = times.forward + times.backward
        bound = np.maximum(labels[:, 1] + 2 * transit + through, self._own(k, times, behind))
        return np.stack([behind + through, bound], axis=1)

    def bound(self, labels: Floats, floor: Floor) -> Floats:
        """The bound among the last stages after the way through the first, or the bound among the first."""
        seconds: Floats = np.maximum(labels[:, 1] + floor.added[0], floor.worst[0, 0])
        return seconds

    def _own(self, k: int, times: StageTimes, behind: Floats) -> Floats:
        """Seconds from the stage's first forward to its last backward, at least.

        Args:
            k: The stage.
            times: Its times.
            behind: Seconds through all stages behind it and back.
        """
        forward, backward, keep = times
        micro_batches, flight = self._problem.micro_batches, self._problem.in_flight(k)
        again = micro_batches - keep
        filling = behind - (flight - 1 + (keep == 0)) * forward
        draining = behind - (flight - 1) * backward - np.minimum(flight, again) * forward
        filling, draining = np.maximum(filling, 0), np.maximum(draining, 0)
        waits = filling + draining if micro_batches > flight else np.maximum(filling, draining)
        rounds, rest = divmod(micro_batches - 1, flight)
        busy = micro_batches * (forward + backward) + again * forward + waits
        seconds: Floats = np.maximum(busy, (rounds + 1) * (forward + behind + backward) + rest * backward)
        return seconds
