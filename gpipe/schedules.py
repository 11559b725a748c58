"""Builders of schedules and passes over them: pure functions from numbers to data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpipe.schedule import Action, Kind, Schedule


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All micro-batches forward, then all backward, the last first (GPipe, arXiv 1811.06965, section 2.3).

    Args:
        stages: Number of stages K, at least 0.
        micro_batches: Number of micro-batches M, at least 1.
    """
    forward = range(micro_batches)
    workers = tuple(
        tuple(Action(k, Kind.FORWARD, m) for m in forward)
        + tuple(Action(k, Kind.BACKWARD, m) for m in reversed(forward))
        for k in range(stages)
    )
    return Schedule("gpipe", stages, micro_batches, workers)


def with_recompute(schedule: Schedule, keep: Sequence[int]) -> Schedule:
    """Put a recompute before every backward but those of the micro-batches a stage keeps.

    A stage keeps the micro-batches whose backward it runs first: under GPipe the last ones, whose activations are
    then stored the shortest time. The recompute is an action of its own, ahead of the wait for the gradient, so
    that it fills time the worker would spend idle.

    Args:
        schedule: A schedule without recompute.
        keep: Per stage the number of micro-batches that keep their activations, 0 to M.
    """
    kept = {
        a
        for k in range(schedule.stages)
        for a in [a for w in schedule.workers for a in w if a.stage == k and a.kind == Kind.BACKWARD][: keep[k]]
    }
    workers = tuple(
        tuple(step for action in actions for step in _recomputed(action, action in kept))
        for actions in schedule.workers
    )
    return replace(schedule, workers=workers)


def _recomputed(action: Action, kept: bool) -> tuple[Action, ...]:
    if action.kind == Kind.BACKWARD and not kept:
        return Action(action.stage, Kind.RECOMPUTE, action.micro_batch), action
    return (action,)
