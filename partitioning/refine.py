"""Better divisions in the neighbourhood of one, by the seconds a step takes."""

from __future__ import annotations

import numpy as np

from gpipe.partitioning.labels import Labels
from gpipe.partitioning.makespan import step_seconds
from gpipe.partitioning.problem import Floats, Ints, Problem

_SHIFTS = (-4, -2, -1, 1, 2, 4)
_PERFORMED = 2**22  # stages times micro-batches performed in one look at the neighbours, and eight times that in all


def best_among(problem: Problem, cuts: Ints) -> tuple[Ints, float]:
    """The division of the fewest seconds among ``cuts``, of shape (P, K + 1), P > 0; and its seconds."""
    seconds = step_seconds(problem, cuts)
    at = int(seconds.argmin())
    return cuts[at], float(seconds[at])


def descend(problem: Problem, labels: Labels, cuts: Ints, seconds: float) -> tuple[Ints, float]:
    """Go to the best neighbour as long as it takes fewer seconds.

    Neighbours differ in one first cell by up to four, or in those of two consecutive stages by one each.

    Args:
        problem: The chain and its devices.
        labels: Of the schedule; their scores tell neighbours that cannot be better.
        cuts: Where to begin, of shape (K + 1,).
        seconds: What it takes.
    """
    each = problem.stages * problem.micro_batches
    left = 8 * _PERFORMED // each
    while left > 0:
        near = _promising(problem, labels, _neighbours(cuts), seconds)[: max(1, _PERFORMED // each)]
        left -= max(1, len(near))
        if not len(near):
            break
        found, fewer = best_among(problem, near)
        if fewer >= seconds * (1 - 1e-12):
            break
        cuts, seconds = found, fewer
    return cuts, seconds


def _neighbours(cuts: Ints) -> Ints:
    inner = len(cuts) - 2
    one = np.eye(inner, dtype=np.int64)
    two = [one[:-1] + one[1:], one[:-1] - one[1:]]
    moves = np.concatenate([*(shift * one for shift in _SHIFTS), *two, *(-move for move in two)])
    near = np.tile(cuts, (len(moves), 1))
    near[:, 1:-1] += moves
    proper: Ints = near[(np.diff(near, axis=1) > 0).all(axis=1)]
    return proper


def _promising(problem: Problem, labels: Labels, cuts: Ints, seconds: float) -> Ints:
    """Those whose stages all allow fewer seconds, the most promising first."""
    worst: Floats = np.full(len(cuts), -np.inf)
    for k in range(problem.stages):
        worst = np.maximum(worst, labels.score(k, cuts[:, k], cuts[:, k + 1]))
    order = np.argsort(worst, kind="stable")
    chosen: Ints = cuts[order[: np.searchsorted(worst[order], seconds)]]
    return chosen
