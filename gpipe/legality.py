"""Is everything there, once and in its place? Checked over arrays, so that millions of actions take moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from gpipe import grid
from gpipe.actions import KINDS, Action, Actions, B, F, I, R, ScheduleError, W


def check_places(name: str, stages: int, micro_batches: int, workers: Sequence[Actions]) -> None:
    """Refuse actions outside the stages and micro-batches, and stages that two workers share.

    Raises:
        ScheduleError: With the first such action.
    """
    hosts: dict[int, int] = {}
    for worker, actions in enumerate(workers):
        wrong = (actions.stage < 0) | (actions.stage >= stages)
        wrong |= (actions.micro_batch < 0) | (actions.micro_batch >= micro_batches)
        if wrong.any():
            position = int(wrong.argmax())
            raise ScheduleError(
                f"schedule {name!r}: {actions[position]} of worker {worker} is outside {stages} stages and "
                f"{micro_batches} micro-batches\n{grid.in_row(workers, [(worker, position)])}"
            )
        for stage in np.unique(actions.stage).tolist():
            if hosts.setdefault(stage, worker) != worker:
                position = int((actions.stage == stage).argmax())
                raise ScheduleError(
                    f"schedule {name!r}: {actions[position]} is given to worker {worker}, but worker {hosts[stage]} "
                    f"hosts stage {stage}. Give a stage to one worker.\n{grid.in_row(workers, [(worker, position)])}"
                )


def check_presence(name: str, stages: int, micro_batches: int, workers: Sequence[Actions]) -> None:
    """Refuse what is missing, doubled, or excludes each other; places must have been checked.

    Raises:
        ScheduleError: With the first such action.
    """
    count = np.zeros((len(KINDS), stages, micro_batches), dtype=np.int64)
    for actions in workers:
        np.add.at(count, (actions.kind, actions.stage, actions.micro_batch), 1)
    there = count > 0
    whole, part = there[B], there[I] | there[W]
    rules = (
        (F, ~there[F], "is missing"),
        (B, ~whole & ~part, "is missing (or I and W in its place)"),
        (I, whole & there[I], "computes again what B computes: give either B, or I and W"),
        (W, whole & there[W], "computes again what B computes: give either B, or I and W"),
        (I, part & ~there[I], "is missing: the weight gradient W follows an input gradient"),
        (W, part & ~there[W], "is missing: the input gradient I alone is half a backward"),
        *((kind, count[kind] > 1, "stands {times} times") for kind in (F, R, B, I, W)),
    )
    for kind, wrong, what in rules:
        if wrong.any():
            place = np.unravel_index(int(wrong.argmax()), wrong.shape)
            _refuse(name, workers, kind, (int(place[0]), int(place[1])), what.format(times=count[kind][place]))


def _refuse(name: str, workers: Sequence[Actions], kind: int, place: tuple[int, int], what: str) -> NoReturn:
    """Raise, marking the action itself, or where it is missing the others of its stage and micro-batch."""
    stage, micro_batch = place
    here = [
        (worker, int(position), int(actions.kind[position]))
        for worker, actions in enumerate(workers)
        for position in np.flatnonzero((actions.stage == stage) & (actions.micro_batch == micro_batch))
    ]
    marked = [(w, p) for w, p, k in here if k == kind] or [(w, p) for w, p, _ in here]
    action = Action(stage, KINDS[kind], micro_batch)
    raise ScheduleError(f"schedule {name!r}: {action} {what}\n{grid.in_row(workers, marked)}")
