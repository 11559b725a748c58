"""A pass over schedules: drop activations and make them again just before they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gpipe.actions import Actions, B, I, R, W
from gpipe.schedule import Schedule


def with_recompute(schedule: Schedule, keep: int | Sequence[int]) -> Schedule:
    """Put a recompute before every backward but those of the micro-batches a stage keeps.

    A stage keeps the micro-batches whose backward it runs first: under GPipe the last ones, whose activations are then
    stored the shortest time; under 1F1B the first.

    The recompute is an action of its own, directly ahead of its backward and so ahead of the wait for the gradient: it
    fills time the worker would spend idle. Still earlier it would stand beside what the action before it holds, which
    costs bytes: another micro-batch's activations live until its backward has ended, and those of a forward while it
    runs, dropped afterwards or not.

    Weight gradients hold activations too, from I to W. One put off past a recompute would keep what the recompute is
    there to save; so a recomputed micro-batch's W follows its I directly, and a stage's W's that were put off are run
    before its first recompute. Hence no stage holds activations of more than max(keep, 1) micro-batches, beside those
    of a forward that runs and drops them. Under ``gpipe_zero_bubble`` with equal stages this costs no time;
    ``zero_bubble_h1`` loses what putting W off had won.

    Args:
        schedule: A valid schedule without recompute.
        keep: Number of micro-batches that keep their activations, 0 to M, or one number per stage.

    Raises:
        TypeError, ValueError: ``keep`` is not what is described here, or the schedule recomputes already.
    """
    kept = _checked(schedule, keep)
    return replace(schedule, workers=tuple(_recomputing(Actions.of(actions), kept) for actions in schedule.workers))


def _recomputing(actions: Actions, keep: Sequence[int]) -> Actions:
    """One worker's actions, sorted by keys: four to a position, for what has to stand just before or after it."""
    keys = 4 * np.arange(len(actions))
    stages, micro_batches, recomputes = [actions.stage], [actions.micro_batch], []
    for stage in np.unique(actions.stage).tolist():
        here = actions.stage == stage
        dropped = np.flatnonzero(here & np.isin(actions.kind, (B, I)))[keep[stage] :]
        if not len(dropped):
            continue
        weights = np.flatnonzero(here & (actions.kind == W))
        after = np.full(int(actions.micro_batch.max()) + 1, 4 * dropped[0] - 2)
        after[actions.micro_batch[dropped]] = 4 * dropped + 1
        keys[weights] = np.minimum(keys[weights], after[actions.micro_batch[weights]])
        recomputes.append(4 * dropped - 1)
        stages.append(actions.stage[dropped])
        micro_batches.append(actions.micro_batch[dropped])
    order = np.argsort(np.concatenate([keys, *recomputes]), kind="stable")
    kinds = np.concatenate([actions.kind, *(np.full(len(r), R, dtype=np.int8) for r in recomputes)])
    return Actions(np.concatenate(stages)[order], kinds[order], np.concatenate(micro_batches)[order])


def _checked(schedule: Schedule, keep: Any) -> Sequence[int]:
    given = [keep] * schedule.stages if isinstance(keep, int) else keep
    if not isinstance(given, Sequence) or any(isinstance(n, bool) or not isinstance(n, int) for n in given):
        raise TypeError(
            f"keep must be an int, the micro-batches that keep their activations, or one a stage, got {keep!r}"
        )
    if len(given) != schedule.stages:
        raise ValueError(
            f"keep gives {len(given)} numbers for {schedule.stages} stages: give one per stage, or one int"
        )
    if any(not 0 <= n <= schedule.micro_batches for n in given):
        raise ValueError(f"keep must be from 0 to {schedule.micro_batches}, the number of micro-batches, got {keep!r}")
    if any((Actions.of(actions).kind == R).any() for actions in schedule.workers):
        raise ValueError(f"schedule {schedule.name!r} recomputes already: give the schedule as its builder made it")
    return given
