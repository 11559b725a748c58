"""The arguments of the solver, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, cast, get_args

from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.problem import NO_LIMIT, Link, Problem, ScheduleName


def problem_of(
    costs: Sequence[CellCost],
    stages: int,
    micro_batches: int,
    schedule: ScheduleName,
    memory_limit: int | Sequence[int | None] | None,
    keep: int | Sequence[int] | None,
    static_bytes_per_param: float,
    links: Any,
    device_speeds: Sequence[float] | None,
    input_bytes: int,
) -> Problem:
    """The problem that the arguments of ``solve``, checked, make.

    Raises:
        ValueError: One of them is not what it should be; the message says what to do.
    """
    count = _checked_cells(costs)
    _check_whole("stages", stages, 1, count, f"the number of cells: there are {count}, and no stage may be empty")
    _check_whole("micro_batches", micro_batches, 1, None, "")
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"schedule: expected one of {', '.join(get_args(ScheduleName))}, got {schedule!r}")
    problem = Problem(
        cells=tuple(costs),
        input_bytes=whole("input_bytes", input_bytes, 0, None, ""),
        stages=int(stages),
        micro_batches=int(micro_batches),
        schedule=schedule,
        limits=_limits(memory_limit, stages),
        keep=_keep(keep, stages, micro_batches),
        static=_positive("static_bytes_per_param", static_bytes_per_param, zero=True),
        speeds=_speeds(device_speeds, stages),
        links=_links(links, stages),
    )
    _check_range(problem)
    return problem


def _checked_cells(costs: Sequence[CellCost]) -> int:
    wrong = [cost for cost in costs if not isinstance(cost, CellCost)]
    if wrong:
        raise ValueError(f"costs: expected a sequence of CellCost, got {type(wrong[0]).__name__} among them")
    if not len(costs):
        raise ValueError("costs: expected at least one cell, got none: there is nothing to divide")
    for i, cost in enumerate(costs):
        if cost.skips and (furthest := max(skip.cells_on for skip in cost.skips)) >= len(costs) - i:
            raise ValueError(
                f"costs: cell {cost.name!r} stashes a value for a cell {furthest} further on, but only "
                f"{len(costs) - i - 1} follow it: give the costs of all cells"
            )
    return len(costs)


def _limits(limit: Any, stages: int) -> tuple[int, ...]:
    values = _per_stage("memory_limit", limit, stages, "bytes")
    return tuple(NO_LIMIT if v is None else whole("memory_limit", v, 1, None, "in bytes") for v in values)


def _keep(keep: Any, stages: int, micro_batches: int) -> tuple[int, ...] | None:
    if keep is None:
        return None
    values = _per_stage("keep", keep, stages, "numbers of micro-batches")
    return tuple(whole("keep", v, 0, micro_batches, "the number of micro-batches") for v in values)


def _speeds(speeds: Any, stages: int) -> tuple[float, ...]:
    if speeds is None:
        return (1.0,) * stages
    return tuple(_positive("device_speeds", v) for v in _per_stage("device_speeds", speeds, stages, "relative speeds"))


def _links(links: Any, stages: int) -> tuple[Link, ...] | None:
    if links is None or stages == 1:
        return None
    given = list(links) if isinstance(links, Iterable) else [links]
    pairs = [given] * (stages - 1) if len(given) == 2 and all(isinstance(x, Real) for x in given) else given
    if len(pairs) != stages - 1:
        raise ValueError(f"links: expected one pair or {stages - 1} for {stages} stages, got {len(pairs)}: {links!r}")
    return tuple(_link(pair) for pair in pairs)


def _link(pair: Any) -> Link:
    if not isinstance(pair, Iterable) or len(numbers := list(pair)) != 2:
        raise ValueError(f"links: expected pairs (latency in seconds, bandwidth in bytes per second), got {pair!r}")
    latency = _positive("links: latency in seconds", numbers[0], zero=True)
    if numbers[1] == math.inf:
        return Link(latency, math.inf)
    return Link(latency, _positive("links: bandwidth in bytes per second", numbers[1]))


def _per_stage(what: str, value: Any, stages: int, kind: str) -> list[Any]:
    """One value for every stage."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        return [value] * stages
    values = list(value)
    if len(values) != stages:
        raise ValueError(f"{what}: expected {stages} {kind}, one per stage, got {len(values)}: {values}")
    return values


def whole(what: str, value: Any, low: int, high: int | None, why: str) -> int:
    """``value`` as an int from ``low`` to ``high``; ``why`` says what sets the range."""
    _check_whole(what, value, low, high, why)
    return int(value)


def _check_whole(what: str, value: Any, low: int, high: int | None, why: str) -> None:
    upper = "" if high is None else f" to {high}"
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < low or (high is not None and value > high):
        more = "" if high is not None else " or more"
        raise ValueError(
            f"{what}: expected a whole number, {low}{upper}{more}{', ' if why else ''}{why}, got {value!r}"
        )


def _positive(what: str, value: Any, zero: bool = False) -> float:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{what}: expected a finite number, {'0 or more' if zero else 'above 0'}, got {value!r}")
    return float(cast(float, value))


def _check_range(problem: Problem) -> None:
    """Refuse sums that 64 bits do not hold."""
    cells = problem.cells
    largest = sum(cell.activation_bytes + cell.workspace_bytes for cell in cells) + problem.input_bytes
    largest += sum(skip.value_bytes + skip.handed_on_bytes + skip.passing for cell in cells for skip in cell.skips)
    largest = (largest + max(cell.boundary_bytes for cell in cells)) * problem.micro_batches
    largest += math.ceil(problem.static * sum(cell.parameter_bytes for cell in cells))
    if largest >= NO_LIMIT // 2 or not math.isfinite(problem.forward[-1] + problem.backward[-1]):
        raise ValueError(
            f"costs: {largest} bytes and {problem.work[-1]} seconds in all are out of range: check the units"
        )
