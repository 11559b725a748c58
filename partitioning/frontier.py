"""The search for the best division: labels of the last stages, extended to the front, pruned by what the rest costs.

Exact up to a stated slack as long as no more than ``beam`` labels are worth keeping for the same cells and stages;
beyond that the most promising are kept, and the bound on what was given up is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpipe.partitioning.bottleneck import Scores
from gpipe.partitioning.labels import Floor, Labels
from gpipe.partitioning.problem import Floats, Ints, Problem, StageTimes

_CANDIDATES = 4
"""Labels looked at for every one that may be kept: the search gives up the rest."""


class Found(NamedTuple):
    """Divisions that may take fewer seconds than ``target``.

    Attributes:
        cuts: Shape (P, K + 1), the most promising first; P may be 0.
        found_bound: No division these stand for takes fewer seconds; each stands for itself, and where labels have
            dominance for those they made superfluous.
        other_bound: No other division takes fewer seconds.
        labels: How many were made, a measure of the work.
    """

    cuts: Ints
    found_bound: float
    other_bound: float
    labels: int


class Band(NamedTuple):
    """For k = 0..K the range of first cells that stage k can have in a division worth finding."""

    low: Sequence[int]
    high: Sequence[int]
    width: int


def band(ahead: Floats, behind: Floats, target: float, width: int) -> Band | None:
    """Where stages can begin, from the best worst scores of the stages before and behind; None if nowhere.

    Args:
        ahead: Of the first n cells in k stages, shape (K + 1, N + 1).
        behind: Of the cells from n on in the stages from k on, of the same shape.
        target: Scores must stay below.
        width: Cells of the widest stage considered.
    """
    within = np.maximum(ahead, behind) < target
    if not within.any(axis=1).all():
        return None
    count = within.shape[1] - 1
    low = within.argmax(axis=1)
    high = count - within[:, ::-1].argmax(axis=1)
    return Band(low.tolist(), high.tolist(), width)


def floors(problem: Problem, labels: Labels, scores: Scores, within: Band, target: float) -> list[Floor]:
    """For k = 0..K the least that the first n cells in k stages add, for n in the band, the link behind included.

    Args:
        problem: The chain and its devices.
        labels: Of the schedule.
        scores: Of all stages considered; those that reach ``target`` are left out.
        within: Where stages begin.
        target: Seconds the search must stay below.
    """
    nothing = labels.link(0, np.zeros(1, dtype=np.int64))
    known = [Floor(np.zeros(1), np.zeros_like(nothing.worst))]
    for k in range(problem.stages):
        parts = [_floor(labels, scores, k, ends, known[k], within, target) for ends in _blocks(within, k + 1, nothing)]
        known.append(Floor(np.concatenate([p.added for p in parts]), np.concatenate([p.worst for p in parts], axis=1)))
    return known


def _blocks(within: Band, k: int, one: Floor) -> list[Ints]:
    """The cells of the band, in parts small enough to be looked at in one go."""
    cells = np.arange(within.low[k], within.high[k] + 1)
    size = max(1, 2**18 // (within.width * len(one.worst)))
    return [cells[i : i + size] for i in range(0, len(cells), size)]


def _floor(labels: Labels, scores: Scores, k: int, ends: Ints, before: Floor, within: Band, target: float) -> Floor:
    firsts, score = scores.before(k, ends)
    low, high = within.low[k], within.high[k]
    allowed = (score < target) & (firsts >= low) & (firsts <= high)
    at = np.clip(firsts, low, high) - low
    part = labels.part(k, firsts, np.broadcast_to(ends[:, None], firsts.shape))
    link = labels.link(k + 1, np.minimum(ends, scores.problem.count - 1))
    added = np.where(allowed, before.added[at] + part.added, np.inf).min(axis=1)
    worst = np.where(allowed, np.maximum(before.worst[:, at], part.worst), np.inf).min(axis=2)
    return Floor(added + link.added, np.maximum(worst, link.worst))


class _Layer(NamedTuple):
    """Labels of the stages from some k on, in the order of their first cells; ``origin`` is the label extended."""

    first: Ints
    labels: Floats
    origin: Ints


class Frontier:
    """One search.

    Args:
        problem: The chain and its devices.
        labels: Of the schedule.
        scores: Of all stages considered.
        within: Where stages can begin.
        target: Seconds to stay below.
        slack: Seconds a superfluous label may be better by, over all stages.
        beam: Labels kept for the same cells and stages.
    """

    def __init__(
        self, problem: Problem, labels: Labels, scores: Scores, within: Band, *, target: float, slack: float, beam: int
    ) -> None:
        self._problem, self._labels, self._scores, self._within = problem, labels, scores, within
        self._target, self._slack, self._beam = target, slack / problem.stages, beam
        self._floors = floors(problem, labels, scores, within, target)
        self._given_up = np.inf
        self._made = 0

    def search(self) -> Found:
        """Extend labels stage by stage, from the last to the first."""
        layers = [_Layer(np.array([self._problem.count]), self._labels.start(), np.zeros(1, dtype=np.int64))]
        for k in reversed(range(self._problem.stages)):
            layers.append(self._extended(k, layers[-1]))
        found = layers[-1].labels
        none = Floor(np.zeros(1), np.zeros_like(self._floors[0].worst))
        least = (
            float(self._labels.bound(found, none).min()) - self._slack * self._problem.stages if len(found) else np.inf
        )
        return Found(_cuts(layers), least, min(self._target, self._given_up), self._made)

    def _extended(self, k: int, behind: _Layer) -> _Layer:
        empty = _Layer(np.zeros(0, dtype=np.int64), behind.labels[:0], np.zeros(0, dtype=np.int64))
        found = [empty]
        for firsts in self._scores.blocks(self._within.low[k], self._within.high[k]):
            ends, score = self._scores.after(k, firsts)
            times = self._problem.stage(k, np.broadcast_to(firsts[:, None], ends.shape), ends)
            starts = np.searchsorted(behind.first, firsts, side="right")
            stops = np.searchsorted(behind.first, firsts + self._within.width, side="right")
            for i in np.flatnonzero(starts < stops):
                origin = np.arange(starts[i], stops[i])
                column = behind.first[origin] - firsts[i] - 1
                promising = score[i, column] < self._target
                origin, column = origin[promising], column[promising]
                row = StageTimes(times.forward[i, column], times.backward[i, column], times.keep[i, column])
                found.append(self._at(k, int(firsts[i]), behind, origin, row))
        return _Layer(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def _at(self, k: int, first: int, behind: _Layer, origin: Ints, times: StageTimes) -> _Layer:
        """The labels worth keeping of stage ``k`` with this first cell, of those that extend the labels ``origin``."""
        labels = self._labels.extend(k, behind.first[origin], times, behind.labels[origin])
        at = first - self._within.low[k]
        floor = Floor(self._floors[k].added[at : at + 1], self._floors[k].worst[:, at : at + 1])
        bound = self._labels.bound(labels, floor)
        order = np.argsort(bound, kind="stable")
        order = order[: np.searchsorted(bound[order], self._target)]
        self._made += len(origin)
        kept = order[self._worth_keeping(labels[order], bound[order])]
        return _Layer(np.full(len(kept), first), labels[kept], origin[kept])

    def _worth_keeping(self, labels: Floats, bound: Floats) -> Ints:
        """Indices of at most ``beam`` labels, sorted by bound, of which none makes another superfluous."""
        left = np.arange(min(len(labels), _CANDIDATES * self._beam))
        kept: list[int] = []
        while len(left) and len(kept) < self._beam:
            kept.append(int(left[0]))
            left = left[1:]
            if self._labels.dominance:
                left = left[(labels[left] < labels[kept[-1]] - self._slack).any(axis=1)]
        given_up = [*left[:1], *range(len(labels))[_CANDIDATES * self._beam :][:1]]
        if given_up:
            self._given_up = min(self._given_up, float(bound[min(given_up)]))
        return np.array(kept, dtype=np.int64)


def _cuts(layers: Sequence[_Layer]) -> Ints:
    """The divisions of the labels in the last layer."""
    at = np.arange(len(layers[-1].first))
    cuts = []
    for layer in reversed(layers):
        cuts.append(layer.first[at])
        at = layer.origin[at]
    return np.stack(cuts, axis=1)
