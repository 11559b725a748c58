"""Which schedule a mini-batch runs: by name, from a builder, or as it is given."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, cast

from gpipe import schedules
from gpipe.schedule import Schedule

AnySchedule = str | Schedule | schedules.Builder


def chosen(schedule: AnySchedule, stages: int, micro_batches: int, keep: tuple[int, ...]) -> Schedule:
    """The schedule to run, validated.

    Args:
        schedule: A name, a builder, or a schedule with its own recompute.
        stages: Number of stages there are.
        micro_batches: Number of micro-batches there are.
        keep: Per stage the micro-batches that keep their activations; not for a ready schedule.

    Raises:
        TypeError, ValueError: It is none of these, cannot be run, or is for other numbers.
    """
    if not isinstance(schedule, Schedule):
        builder = schedules.builder(schedule) if isinstance(schedule, str) else schedule
        if not callable(builder):
            raise TypeError(
                f"schedule must be one of {', '.join(map(repr, schedules.BUILDERS))}, a builder or a Schedule, got "
                f"{type(schedule).__name__} {schedule!r}"
            )
        return _built(cast(Hashable, builder), stages, micro_batches, keep)
    if (schedule.stages, schedule.micro_batches) != (stages, micro_batches):
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.stages} stages and {schedule.micro_batches} micro-batches, "
            f"but there are {stages} and {micro_batches}: build it for these, or give its builder"
        )
    return _validated(schedule)


@lru_cache(maxsize=64)
def _built(builder: Any, stages: int, micro_batches: int, keep: tuple[int, ...]) -> Schedule:
    return schedules.with_recompute(builder(stages=stages, micro_batches=micro_batches), keep).validate()


@lru_cache(maxsize=64)
def _validated(schedule: Schedule) -> Schedule:
    return schedule.validate()
