"""From a first division that fits to the best one: bounds, the frontier search, and a look at the neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gpipe.partitioning.bottleneck import Scores, best_of_first, best_of_last, cuts_from, widest
from gpipe.partitioning.frontier import Frontier, band, floors
from gpipe.partitioning.labels import GPipeLabels, Labels, OneFOneBLabels
from gpipe.partitioning.problem import NO_LIMIT, Floats, Ints, Problem
from gpipe.partitioning.refine import best_among, descend

TOLERANCE = 5e-4
"""How far above the lower bound, as a share of the step, a division is taken for the best."""

_SHARES = (0.25, 0.5, 1.0)
"""Where to look first: how far from the lower bound towards the best known division."""

_BEAMS = (2, 12, 128)
"""Labels kept for the same cells and stages, in one search after the other."""

_LABELS = 2**22
"""Labels the next search may be expected to make: as many as the one before for each label kept."""

_GRID = 12
"""Micro-batches at which a path is followed through stages that keep different numbers, the first and last aside."""


@dataclass(frozen=True)
class Division:
    """A division of the cells.

    Attributes:
        cuts: 0, the first cell of every stage but the first, N. Shape (K + 1,).
        seconds: What a step takes.
        bound: No division takes fewer seconds.
    """

    cuts: Ints
    seconds: float
    bound: float


def best_division(problem: Problem) -> Division | None:
    """The division whose step takes the fewest seconds, or None if none fits.

    Args:
        problem: The chain and its devices.
    """
    cuts = first_division(problem)
    return None if cuts is None else _Search(problem, cuts).run()


def first_division(problem: Problem) -> Ints | None:
    """The division whose slowest stage is fastest, among those that fit; None if none fits.

    Stages of about the average work are tried first, then wider ones, until nothing wider fits.
    """
    every = widest(problem, np.inf)
    longest = 2 * max(problem.work[-1] / problem.stages, float(np.diff(problem.work).max()))
    while True:
        width = widest(problem, longest)
        best, choice = best_of_first(Scores(problem, lambda k, a, b: _paces(problem, k, a, b), width))
        if np.isfinite(best[-1, -1]):
            return cuts_from(choice)
        if width >= every:
            return None
        longest = longest * 2 if longest > 0 and width < every / 2 else np.inf


def _paces(problem: Problem, k: int, first: Ints, end: Ints) -> Floats:
    """Seconds a stage needs for one more micro-batch, recompute included."""
    forward, backward, keep = problem.stage(k, first, end)
    again = (problem.micro_batches - np.maximum(keep, 1)) / max(problem.micro_batches - 1, 1)
    return np.where(keep >= 0, forward + backward + again * forward, np.inf)


class _Search:
    """The best division so far, and the best lower bound."""

    def __init__(self, problem: Problem, cuts: Ints) -> None:
        self._problem = problem
        self._cuts, self._seconds = best_among(problem, cuts[None])
        self._bound = float(problem.work[-1])
        self._shortest = self._bound
        self._made = 0
        self._labels = self._labels_for(self._shortest)
        self._cuts, self._seconds = descend(problem, self._labels, self._cuts, self._seconds)

    def run(self) -> Division:
        """Search with ever more labels until the best division is proved to be so, or the work is done."""
        if not self._proved():
            bounds = self._bounds()
            if self._uneven_paths():
                bounds = self._sharper(*bounds)
            for share in _SHARES:
                before = self._seconds
                self._pass(*bounds, _BEAMS[0], share)
                if self._proved() or self._seconds < before:
                    break
            for beam in _BEAMS[1:]:
                if self._proved() or self._made * 4 > _LABELS:
                    break
                self._pass(*bounds, beam, 1.0)
        return Division(self._cuts, self._seconds, min(self._bound, self._seconds))

    def _proved(self) -> bool:
        return self._seconds * (1 - TOLERANCE) <= self._bound

    def _uneven_paths(self) -> bool:
        """Whether the seconds a micro-batch takes through all stages differ between divisions."""
        return self._problem.links is not None or len(set(self._problem.speeds)) > 1

    def _bounds(self) -> tuple[Scores, Floats, Floats]:
        """Scores of all stages that a better division can have, and the best worst scores ahead and behind."""
        width = widest(self._problem, self._labels.longest(self._seconds))
        scores = Scores(self._problem, self._labels.score, width)
        ahead, _ = best_of_first(scores)
        self._bound = max(self._bound, float(ahead[-1, -1]))
        return scores, ahead, best_of_last(scores)

    def _sharper(self, scores: Scores, ahead: Floats, behind: Floats) -> tuple[Scores, Floats, Floats]:
        """The same once it is known what the shortest path through all stages takes."""
        within = band(ahead, behind, self._seconds, scores.width)
        if within is None or not self._labels.dominance:
            return scores, ahead, behind
        shortest = float(floors(self._problem, self._labels, scores, within, self._seconds)[-1].added[0])
        self._shortest = min(shortest, self._seconds)
        self._labels = self._labels_for(self._shortest)
        return self._bounds()

    def _pass(self, scores: Scores, ahead: Floats, behind: Floats, beam: int, share: float) -> None:
        """One search."""
        target = self._bound + share * (self._seconds * (1 - TOLERANCE / 2) - self._bound)
        within = band(ahead, behind, target, scores.width)
        if within is None:
            self._bound = max(self._bound, target)
            return
        slack = self._seconds * TOLERANCE / 2
        found = Frontier(self._problem, self._labels, scores, within, target=target, slack=slack, beam=beam).search()
        if len(found.cuts):
            best = best_among(self._problem, np.concatenate([found.cuts, self._cuts[None]]))
            self._cuts, self._seconds = descend(self._problem, self._labels, *best)
        found_bound = found.found_bound if self._labels.dominance else self._seconds
        self._bound = max(self._bound, min(found_bound, found.other_bound))
        self._made = found.labels

    def _labels_for(self, shortest: float) -> Labels:
        if self._problem.schedule == "1f1b":
            return OneFOneBLabels(self._problem)
        return GPipeLabels(self._problem, self._grid(), shortest)

    def _grid(self) -> Ints:
        """Micro-batches at which stages change from kept to recomputed ones: all if known beforehand, else some."""
        problem, moves = self._problem, self._problem.micro_batches - 1
        changes = np.zeros(0, dtype=np.int64)
        if problem.keep is not None:
            changes = np.array(problem.keep) - 1
        elif min(problem.limits) < NO_LIMIT:
            keep = [
                problem.stage(k, self._cuts[k : k + 1], self._cuts[k + 1 :][:1]).keep for k in range(problem.stages)
            ]
            changes = np.concatenate([np.sort(np.concatenate(keep)) - 1, np.linspace(0, moves, problem.stages)])
        changes = np.unique(np.clip(changes.astype(np.int64), 0, moves))
        some = changes[np.linspace(0, len(changes) - 1, min(len(changes), _GRID)).astype(np.int64)]
        return np.unique(np.concatenate([[0, moves], some]))
