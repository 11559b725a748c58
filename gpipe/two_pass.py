"""Two passes over the micro-batches, for losses over the whole of a huge mini-batch.

The first pass runs all forwards and keeps the outputs alone. The loss, computed on all of them, gives their gradients.
The second pass runs every micro-batch forward again, as a recompute does, and backward from those gradients, in any
schedule: all gradients are there before it begins, so forward and backward may interleave, and few micro-batches are
under way at a time. Where one pass keeps a boundary per micro-batch and stage until the loss has come, two passes keep
features. They cost a forward more than one pass that keeps its activations. In the first pass a stage waits where the
next one falls behind, or boundaries would queue up there as many as one pass keeps.
GradCache, arXiv 2101.06983, section 3.2, over the stages of a pipeline.

As the second pass has every gradient from the start, it may begin with the last micro-batch. Parameter gradients are
then added up in the order of one pass, to the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from gpipe.actions import Action, Actions, F
from gpipe.schedule import Schedule

DEFAULT = "one_f_one_b"
"""The second pass's schedule, if none is given."""


def last_first(schedule: Schedule) -> Schedule:
    """The same schedule with the last micro-batch in the place of the first, unless backward begins with it anyway.

    Args:
        schedule: A valid schedule.
    """
    every = schedule.order
    backward = np.flatnonzero((every.actions.kind != F) & (every.actions.stage == schedule.stages - 1))
    first = backward[every.step[backward].argmin()] if len(backward) else 0
    if not len(backward) or every.actions.micro_batch[first] == schedule.micro_batches - 1:
        return schedule
    return replace(schedule, workers=_mirrored(schedule.workers, schedule.micro_batches))


@lru_cache(maxsize=64)
def passes(schedule: Schedule) -> tuple[tuple[Sequence[Action], ...], tuple[Sequence[Action], ...]]:
    """What every worker does in the first pass, and in the second, which is ``schedule``.

    The first pass is the schedule's forwards, from the first micro-batch on: buffers that forward changes go through
    the values they have in one pass.
    """
    forwards = []
    for actions in map(Actions.of, schedule.workers):
        forward = actions.kind == F
        forwards.append(Actions(*(column[forward] for column in actions.columns)))
    from_last = any(len(f) and f.micro_batch[0] == schedule.micro_batches - 1 for f in forwards)
    first = _mirrored(forwards, schedule.micro_batches) if from_last else tuple(forwards)
    return first, schedule.workers


@lru_cache(maxsize=64)
def window(schedule: Schedule) -> int | None:
    """By how many micro-batches a stage may be ahead of the next in the first pass: as many as under 1F1B.

    None, for any number, where waiting might have no end: stages share a worker, or go in another order.
    """
    orders = {tuple(actions.micro_batch.tolist()) for actions in map(Actions.of, passes(schedule)[0])}
    return schedule.stages if orders == {tuple(range(schedule.micro_batches))} else None


def _mirrored(workers: Sequence[Sequence[Action]], micro_batches: int) -> tuple[Actions, ...]:
    """Every worker's actions with micro-batches numbered from the end; what waits for what stays."""
    found = map(Actions.of, workers)
    return tuple(Actions(a.stage, a.kind, micro_batches - 1 - a.micro_batch) for a in found)
