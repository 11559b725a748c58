"""The best division of cells into stages for given devices: the front door to the solver."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, cast, get_args

import numpy as np

from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.infeasible import Infeasible, explained
from gpipe.partitioning.makespan import divided
from gpipe.partitioning.partition import Partition, StagePlan
from gpipe.partitioning.problem import NO_LIMIT, Link, Problem, ScheduleName
from gpipe.partitioning.search import Division, best_division

__all__ = ["Infeasible", "Link", "Partition", "StagePlan", "solve"]


def solve(
    costs: Sequence[CellCost],
    stages: int,
    *,
    micro_batches: int,
    schedule: ScheduleName = "gpipe",
    memory_limit: int | Sequence[int | None] | None = None,
    keep: int | Sequence[int] | None = None,
    static_bytes_per_param: float = 4.0,
    links: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
    device_speeds: Sequence[float] | None = None,
    input_bytes: int = 0,
) -> Partition:
    """Divide a chain of cells into the stages whose step takes the fewest seconds.

    A step is the longest path through the schedule's actions: stage k recomputes all micro-batches it does not keep,
    each just before its backward and ahead of the wait for its gradient. Under GPipe with all or none kept and free
    links this is sum F + sum B + (M - 1) (max F + max B), the recompute in B. Stages whose memory lets them keep some
    change their pace in the course of the backward, and the path is followed through these changes.

    A stage holds ``static_bytes_per_param`` times its parameters, the inputs of its micro-batches, the activations of
    those it keeps (of one, if it recomputes all), and its largest workspace; see ``Problem.bytes``. What the loss holds
    of the model's outputs belongs to no cell: take it off the last stage's limit.

    Args:
        costs: One for every cell, for one micro-batch, in order.
        stages: Number of stages K, 1 to the number of cells. None is left empty.
        micro_batches: Number of micro-batches M a mini-batch is split into.
        schedule: ``"gpipe"``: all forward, then all backward, the last first; the last ``keep`` are kept. ``"1f1b"``:
            one forward, one backward in turn with K - k micro-batches in flight; the first ``keep`` are kept.
        memory_limit: Bytes of every device, or one per stage; None where there is no limit.
        keep: Micro-batches that keep their activations, 0 to M, or one number per stage. None keeps as many as fit.
        static_bytes_per_param: Bytes held all step long per byte of parameter: 1 for the parameter, 1 for its gradient,
            and the optimizer's state: 2.0 for plain SGD, 3.0 with momentum, 4.0 for Adam in the parameters' precision.
        links: (latency in seconds, bandwidth in bytes per second) of every link between two stages, or one pair per
            link, from the first stage on. None: messages take no time.
        device_speeds: How fast every stage's device is, relative to the one the costs are from. None: as fast.
        input_bytes: One micro-batch of the model's input, which the first stage holds as others hold their boundary.

    Returns:
        The partition with the fewest predicted seconds; ``lower_bound`` says how far the best can be.

    Raises:
        ValueError: An argument is not what is described here; the message says what to do.
        Infeasible: No division fits the memory. A ``ValueError`` that says what is missing where, and what would do.
    """
    count = _checked_cells(costs)
    _check_whole("stages", stages, 1, count, f"the number of cells: there are {count}, and no stage may be empty")
    _check_whole("micro_batches", micro_batches, 1, None, "")
    if schedule not in get_args(ScheduleName):
        raise ValueError(f"schedule: expected one of {', '.join(get_args(ScheduleName))}, got {schedule!r}")
    problem = Problem(
        cells=tuple(costs),
        input_bytes=_whole("input_bytes", input_bytes, 0, None, ""),
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
    division = best_division(problem)
    if division is None:
        raise explained(problem)
    return _partition(problem, division)


def _partition(problem: Problem, division: Division) -> Partition:
    times = divided(problem, division.cuts[None])
    plans = []
    for k in range(problem.stages):
        first, end = division.cuts[k : k + 1], division.cuts[k + 1 : k + 2]
        cells = problem.cells[int(first[0]) : int(end[0])]
        size = problem.bytes(k, first, end, times.keep[:, k])
        static, inputs, activations, workspace = (int(part.max()) for part in size)
        kept = int(times.keep[0, k])
        plans.append(
            StagePlan(
                cells=len(cells),
                first_cell=cells[0].name,
                last_cell=cells[-1].name,
                largest_cell=max(cells, key=lambda cell: cell.forward_seconds + cell.backward_seconds).name,
                keep=kept,
                recomputed=problem.micro_batches - kept,
                in_flight=problem.in_flight(k),
                forward_seconds=float(times.forward[0, k]),
                backward_seconds=float(times.backward[0, k]),
                arrival_seconds=float(times.transit[0, k]),
                static_bytes=static,
                input_bytes=inputs,
                activation_bytes=activations,
                micro_batch_bytes=sum(cell.activation_bytes for cell in cells),
                workspace_bytes=workspace,
                memory_limit=None if problem.limits[k] >= NO_LIMIT else problem.limits[k],
            )
        )
    return Partition(problem.schedule, problem.micro_batches, division.seconds, division.bound, tuple(plans))


def _checked_cells(costs: Sequence[CellCost]) -> int:
    wrong = [cost for cost in costs if not isinstance(cost, CellCost)]
    if wrong:
        raise ValueError(f"costs: expected a sequence of CellCost, got {type(wrong[0]).__name__} among them")
    if not len(costs):
        raise ValueError("costs: expected at least one cell, got none: there is nothing to divide")
    return len(costs)


def _limits(limit: Any, stages: int) -> tuple[int, ...]:
    values = _per_stage("memory_limit", limit, stages, "bytes")
    return tuple(NO_LIMIT if v is None else _whole("memory_limit", v, 1, None, "in bytes") for v in values)


def _keep(keep: Any, stages: int, micro_batches: int) -> tuple[int, ...] | None:
    if keep is None:
        return None
    values = _per_stage("keep", keep, stages, "numbers of micro-batches")
    return tuple(_whole("keep", v, 0, micro_batches, "the number of micro-batches") for v in values)


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


def _whole(what: str, value: Any, low: int, high: int | None, why: str) -> int:
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
    largest = (largest + max(cell.boundary_bytes for cell in cells)) * problem.micro_batches
    largest += math.ceil(problem.static * sum(cell.parameter_bytes for cell in cells))
    if largest >= NO_LIMIT // 2 or not np.isfinite(problem.forward[-1] + problem.backward[-1]):
        raise ValueError(
            f"costs: {largest} bytes and {problem.work[-1]} seconds in all are out of range: check the units"
        )
