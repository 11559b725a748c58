"""Divisions whose worst stage is best: dynamic programmes over the first cells and over the last.

Stages are consecutive, so a division is a path through the cells, and the best worst stage of the first n cells in k
stages follows from that of fewer cells in k - 1. Only stages of up to ``width`` cells are considered; memory is
proportional to cells times (width + stages). Nothing is assumed of the scores: a stage may fit while one it contains
does not, because what enters it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gpipe.partitioning.problem import Floats, Ints, Problem

Score = Callable[[int, Ints, Ints], Floats]
"""A number for stage k with the cells first..end-1; smaller is better, infinite if it cannot be."""

_BLOCK = 2**18  # (end, first) pairs looked at in one go


class Scores:
    """Scores of all stages of up to ``width`` cells, those of one end or of one first cell at a time.

    Args:
        problem: The chain and its devices.
        score: What a stage is worth.
        width: Cells of the widest stage considered.
    """

    def __init__(self, problem: Problem, score: Score, width: int) -> None:
        self.problem, self.width = problem, width
        self._score = score
        self._table: Floats | None = None
        if problem.uniform:
            ends = np.arange(1, problem.count + 1)
            self._table = np.concatenate([self._before(0, part)[1] for part in self._parts(ends)])

    def blocks(self, low: int, high: int) -> Iterator[Ints]:
        """``low`` to ``high``, in parts small enough to be looked at in one go."""
        return self._parts(np.arange(low, high + 1))

    def before(self, k: int, ends: Ints) -> tuple[Ints, Floats]:
        """First cells of the stages that end before ``ends``, and their scores; shape (ends, width)."""
        if self._table is None:
            return self._before(k, ends)
        return self._firsts(ends), self._table[ends - 1]

    def after(self, k: int, firsts: Ints) -> tuple[Ints, Floats]:
        """Ends of the stages that begin with ``firsts``, and their scores; shape (firsts, width)."""
        columns = np.arange(self.width)
        ends = firsts[:, None] + 1 + columns
        within = ends <= self.problem.count
        ends = np.minimum(ends, self.problem.count)
        if self._table is None:
            score = self._score(k, np.broadcast_to(firsts[:, None], ends.shape), ends)
        else:
            score = self._table[ends - 1, columns]
        return ends, np.where(within, score, np.inf)

    def _before(self, k: int, ends: Ints) -> tuple[Ints, Floats]:
        firsts = self._firsts(ends)
        within = ends[:, None] - firsts == np.arange(1, self.width + 1)
        return firsts, np.where(within, self._score(k, firsts, np.broadcast_to(ends[:, None], firsts.shape)), np.inf)

    def _firsts(self, ends: Ints) -> Ints:
        firsts: Ints = np.maximum(ends[:, None] - np.arange(1, self.width + 1), 0)
        return firsts

    def _parts(self, cells: Ints) -> Iterator[Ints]:
        size = max(1, _BLOCK // self.width)
        return (cells[i : i + size] for i in range(0, len(cells), size))


def best_of_first(scores: Scores) -> tuple[Floats, Ints]:
    """For every k and n the smallest worst score of the first n cells in k stages, and the last stage's first cell.

    Args:
        scores: Of all stages considered.

    Returns:
        Both of shape (K + 1, N + 1). The score is infinite where there is no such division.
    """
    stages, count = scores.problem.stages, scores.problem.count
    best = np.full((stages + 1, count + 1), np.inf)
    choice = np.zeros((stages + 1, count + 1), dtype=np.int32)
    best[0, 0] = -np.inf
    for k in range(stages):
        for ends in scores.blocks(k + 1, count - (stages - 1 - k)):
            firsts, score = scores.before(k, ends)
            worst = np.maximum(best[k][firsts], score)
            column = worst.argmin(axis=1)
            best[k + 1, ends] = np.take_along_axis(worst, column[:, None], axis=1)[:, 0]
            choice[k + 1, ends] = ends - 1 - column
    return best, choice.astype(np.int64)


def best_of_last(scores: Scores) -> Floats:
    """For every k and n the smallest worst score of the cells from n on in the stages from k on.

    Args:
        scores: Of all stages considered.

    Returns:
        Of shape (K + 1, N + 1), infinite where there is no such division.
    """
    stages, count = scores.problem.stages, scores.problem.count
    best = np.full((stages + 1, count + 1), np.inf)
    best[stages, count] = -np.inf
    for k in reversed(range(stages)):
        for firsts in scores.blocks(k, count - (stages - k)):
            ends, score = scores.after(k, firsts)
            best[k, firsts] = np.maximum(best[k + 1][ends], score).min(axis=1)
    return best


def cuts_from(choice: Ints) -> Ints:
    """The division that ``choice`` leads to: 0, the first cell of every further stage, N. Shape (K + 1,)."""
    cuts = [choice.shape[1] - 1]
    for k in reversed(range(1, len(choice))):
        cuts.append(int(choice[k, cuts[-1]]))
    return np.array(cuts[::-1], dtype=np.int64)


def widest(problem: Problem, longest: Floats | float) -> int:
    """Cells of the widest stage whose work is within ``longest`` seconds on the fastest device and that fits a device.

    Args:
        problem: The chain and its devices.
        longest: Seconds of forward and backward of one micro-batch; one number, or one per first cell.
    """
    first = np.arange(problem.count)
    slack = 1e-9 * problem.work[-1]
    end = np.searchsorted(problem.work, problem.work[:-1] + longest + slack, side="right") - 1
    return int(max(1, (np.minimum(end, _last_fitting(problem)) - first).max()))


def _last_fitting(problem: Problem) -> Ints:
    """For every first cell the end of the longest stage that fits some device; more cells from there on need more."""
    first = np.arange(problem.count)
    furthest = first.copy()
    for k in [0] if problem.uniform else range(problem.stages):
        low, high = first.copy(), np.full(problem.count, problem.count)
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = problem.least_bytes(k, first, np.maximum(middle, first + 1)) <= problem.limits[k]
            low, high = np.where(fits & (low < high), middle, low), np.where(fits, high, np.maximum(low, middle - 1))
        furthest = np.maximum(furthest, low)
    return furthest
