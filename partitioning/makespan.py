"""Seconds of one training step, exactly: the longest path through the schedule's actions.

Many divisions are computed at once. Shapes are (P, K): P divisions into K stages; M is the number of micro-batches.
Recompute is an action of its own ahead of the wait for the gradient, and takes as long as the forward. A link carries
one message after the other, forward and backward independently, while the stages compute.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpipe.partitioning.problem import Floats, Ints, Problem

_BATCH = 2**21  # numbers the simulation of 1F1B holds at a time


class Divided(NamedTuple):
    """P divisions: seconds of one micro-batch on every stage and on the link into it; all of shape (P, K)."""

    forward: Floats
    backward: Floats
    keep: Ints
    transit: Floats
    occupied: Floats


def divided(problem: Problem, cuts: Ints) -> Divided:
    """Seconds and keep of every stage.

    Args:
        problem: The chain and its devices.
        cuts: Shape (P, K + 1): 0, the first cell of every stage but the first, N; increasing.
    """
    columns = []
    for k in range(problem.stages):
        times = problem.stage(k, cuts[:, k], cuts[:, k + 1])
        columns.append((*times, *problem.transit(k, cuts[:, k])))
    forward, backward, keep, transit, occupied = (np.stack(column, axis=1) for column in zip(*columns, strict=True))
    return Divided(forward, backward, keep.astype(np.int64), transit, occupied)


def step_seconds(problem: Problem, cuts: Ints) -> Floats:
    """Seconds of a step for every division; infinite where a stage does not fit its device. Shape (P,).

    Args:
        problem: The chain and its devices.
        cuts: As for ``divided``.
    """
    stages = divided(problem, cuts)
    seconds = np.full(len(cuts), np.inf)
    fits = np.flatnonzero((stages.keep >= 0).all(axis=1))
    chosen = _some(stages, fits)
    if problem.schedule == "gpipe":
        seconds[fits] = gpipe_seconds(chosen, problem.micro_batches)
    else:
        seconds[fits] = one_f_one_b_seconds(chosen, problem.micro_batches)
    return seconds


def gpipe_seconds(stages: Divided, micro_batches: int) -> Floats:
    """All micro-batches forward, then all backward, the last first; stage k recomputes all but the last keep[k].

    With all or none kept and free links this is sum F + sum B + (M - 1) (max F + max B), the recompute in B, and one
    recompute more if none is kept. Where stages keep some, no such formula holds: which stage is slowest changes in the
    course of the backward. The path is then followed at the micro-batches where a stage changes its pace.

    Args:
        stages: What the stages cost.
        micro_batches: M.
    """
    moves = micro_batches - 1
    keep = np.clip(stages.keep, 1, micro_batches)
    done = np.cumsum(stages.forward + stages.transit, axis=1)
    done += moves * np.maximum.accumulate(np.maximum(stages.forward, stages.occupied), axis=1)
    grid = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), keep.ravel() - 1, np.full(1, moves)]))
    time = np.repeat(done[:, -1:], len(grid), axis=1)  # when gradients arrive at the last stage
    for k in reversed(range(stages.forward.shape[1])):
        forward = stages.forward[:, k : k + 1]
        start = done[:, k] + np.where(stages.keep[:, k] == 0, stages.forward[:, k], 0)
        time[:, 0] = np.maximum(time[:, 0], start)
        pace = stages.backward[:, k : k + 1] * grid + forward * np.maximum(grid - (keep[:, k : k + 1] - 1), 0)
        time = passed(time, pace) + stages.backward[:, k : k + 1]
        time = passed(time, stages.occupied[:, k : k + 1] * grid) + stages.transit[:, k : k + 1]
    last: Floats = time[:, -1]
    return last


def passed(time: Floats, pace: Floats) -> Floats:
    """When micro-batches that arrive at ``time`` have caught up with a stage of the given ``pace``.

    Args:
        time: Arrival at some micro-batches, along the last axis.
        pace: Seconds the stage needs from the first micro-batch to each of these.
    """
    return pace + np.maximum.accumulate(time - pace, axis=-1)


def one_f_one_b_seconds(stages: Divided, micro_batches: int) -> Floats:
    """Stage k sends min(K - k, M) micro-batches forward, then one backward, one forward in turn, the first one first.

    Stage k recomputes all but the first keep[k] micro-batches. The schedule is performed, all stages at a time: stage
    k's forward of micro-batch m has slot k + m while the pipeline fills and k + 2m afterwards, its backward has slot
    2K - 1 - k + 2m, and an action depends on earlier slots alone.

    Args:
        stages: What the stages cost.
        micro_batches: M.
    """
    divisions, count = stages.forward.shape
    size = max(1, _BATCH // (count * micro_batches))
    parts = [
        _Performed(_some(stages, np.arange(i, min(i + size, divisions))), micro_batches).seconds()
        for i in range(0, divisions, size)
    ]
    return np.concatenate(parts) if parts else np.zeros(0)


def _some(stages: Divided, which: NDArray[Any]) -> Divided:
    forward, backward, keep, transit, occupied = stages
    return Divided(forward[which], backward[which], keep[which], transit[which], occupied[which])


class _Performed:
    """Divisions that are run through 1F1B slot by slot."""

    def __init__(self, stages: Divided, micro_batches: int) -> None:
        divisions, count = stages.forward.shape
        self.stages, self.count, self.micro_batches = stages, count, micro_batches
        self.clock = np.zeros((divisions, count))
        # forward[:, k]: when inputs arrive at stage k; backward[:, k]: when gradients do
        self.forward = np.zeros((divisions, count + 1, micro_batches))
        self.backward = np.zeros((divisions, count, micro_batches))
        self.sent_forward = np.full((divisions, count + 1), -np.inf)
        self.sent_backward = np.full((divisions, count + 1), -np.inf)
        beyond = np.zeros((divisions, 1))
        self.transit = np.concatenate([stages.transit, beyond], axis=1)
        self.occupied = np.concatenate([stages.occupied, beyond], axis=1)

    def seconds(self) -> Floats:
        """When every stage has performed its last action."""
        k = np.arange(self.count)
        for slot in range(2 * (self.micro_batches + self.count - 1)):
            filling = slot < self.count
            ahead = slot - k
            m = ahead if filling else ahead // 2
            late = filling | ((ahead % 2 == 0) & (m >= self.count - k))
            here = late & (m >= 0) & (m < self.micro_batches)
            self._forward(k[here], m[here])
            behind = slot - (2 * self.count - 1 - k)
            here = (behind % 2 == 0) & (behind >= 0) & (behind < 2 * self.micro_batches)
            self._backward(k[here], behind[here] // 2)
        total: Floats = self.clock.max(axis=1)
        return total

    def _forward(self, k: NDArray[np.intp], m: NDArray[np.intp]) -> None:
        if not len(k):
            return
        self.clock[:, k] = np.maximum(self.clock[:, k], self.forward[:, k, m]) + self.stages.forward[:, k]
        start = np.maximum(self.clock[:, k], self.sent_forward[:, k + 1] + self.occupied[:, k + 1])
        self.sent_forward[:, k + 1] = start
        self.forward[:, k + 1, m] = start + self.transit[:, k + 1]

    def _backward(self, k: NDArray[np.intp], m: NDArray[np.intp]) -> None:
        if not len(k):
            return
        ready = self.clock[:, k] + np.where(m >= self.stages.keep[:, k], self.stages.forward[:, k], 0)
        self.clock[:, k] = np.maximum(ready, self.backward[:, k, m]) + self.stages.backward[:, k]
        start = np.maximum(self.clock[:, k], self.sent_backward[:, k] + self.occupied[:, k])
        self.sent_backward[:, k] = start
        inner = k > 0
        self.backward[:, k[inner] - 1, m[inner]] = (start + self.transit[:, k])[:, inner]
