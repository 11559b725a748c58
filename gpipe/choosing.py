"""Which schedule a mini-batch runs: by name, from a builder, or as it is given."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any

from gpipe import schedules, two_pass
from gpipe.schedule import Schedule

AnySchedule = str | Schedule | schedules.Builder | None


def chosen(
    schedule: AnySchedule, stages: int, micro_batches: int, keep: tuple[int, ...], two_passes: bool = False
) -> Schedule:
    """The schedule to run, validated.

    Args:
        schedule: A name, a builder, or a schedule with its own recompute; None for the default.
        stages: Number of stages there are.
        micro_batches: Number of micro-batches there are.
        keep: Per stage the micro-batches that keep their activations; not for a ready schedule.
        two_passes: It is for the second of two passes, which goes backward from the last micro-batch to the first; a
            ready schedule stays as it is.

    Raises:
        TypeError, ValueError: It is none of these, cannot be run, or is for other numbers.
    """
    if schedule is None:
        schedule = two_pass.DEFAULT if two_passes else "gpipe"
    if not isinstance(schedule, Schedule):
        builder = schedules.builder(schedule) if isinstance(schedule, str) else schedule
        if not callable(builder):
            raise TypeError(
                f"schedule must be one of {', '.join(map(repr, schedules.BUILDERS))}, a builder or a Schedule, got "
                f"{type(schedule).__name__} {schedule!r}"
            )
        if not isinstance(builder, Hashable):
            return _built.__wrapped__(builder, stages, micro_batches, keep, two_passes)
        return _built(builder, stages, micro_batches, keep, two_passes)
    _check_numbers(schedule, stages, micro_batches)
    return _validated(schedule)


@lru_cache(maxsize=64)
def _built(builder: Any, stages: int, micro_batches: int, keep: tuple[int, ...], two_passes: bool) -> Schedule:
    made = builder(stages=stages, micro_batches=micro_batches)
    if not isinstance(made, Schedule):
        raise TypeError(f"a schedule's builder must return a Schedule, got {type(made).__name__} from {builder!r}")
    _check_numbers(made, stages, micro_batches)
    built = schedules.with_recompute(made, keep).validate()
    return two_pass.last_first(built) if two_passes else built


def _check_numbers(schedule: Schedule, stages: int, micro_batches: int) -> None:
    if (schedule.stages, schedule.micro_batches) != (stages, micro_batches):
        raise ValueError(
            f"schedule {schedule.name!r} is for {schedule.stages} stages and {schedule.micro_batches} micro-batches, "
            f"but there are {stages} and {micro_batches}: build it for these, or give a builder that does"
        )


@lru_cache(maxsize=64)
def _validated(schedule: Schedule) -> Schedule:
    return schedule.validate()
