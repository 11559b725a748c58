"""Gradients that wait at a stage slower than the one after it: what they take, and partitions with room for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gpipe import schedules
from gpipe.actions import Action, Kind
from gpipe.costs import StageCost
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.infeasible import Infeasible
from gpipe.partitioning.partition import Partition, StagePlan
from gpipe.partitioning.solve import solve
from gpipe.simulate import simulate

_TRIES = 8
_ROUNDING = 1e-9


def solve_with_queues(
    costs: Sequence[CellCost],
    stages: int,
    *,
    micro_batches: int,
    memory_limit: int | Sequence[int] | None,
    keep: Sequence[int] | None,
    input_bytes: int,
) -> Partition:
    """As ``solve`` for GPipe's schedule, with room on every limited device for the gradients that will wait there.

    A division is solved for without them; where they would not fit beside it, its stages are given that much less than
    they take, and it is solved again. The waiting gradients stand among a stage's inputs.

    Raises:
        Infeasible: No division fits the memory, or none that leaves room for them was found.
    """
    limits = memory_limit if isinstance(memory_limit, Sequence) else [memory_limit] * stages
    reserved = [0] * stages
    for _ in range(_TRIES):
        left = [None if limit is None else max(limit - r, 1) for limit, r in zip(limits, reserved, strict=True)]
        try:
            found = _solved(costs, stages, micro_batches, left, keep, input_bytes, reserved)
        except Infeasible:
            if keep is not None or not any(reserved):
                raise
            break
        waiting = waiting_bytes(found, costs, input_bytes)
        over = [
            0 if limit is None else max(0, stage.bytes + w - limit)
            for stage, w, limit in zip(found.stages, waiting, limits, strict=True)
        ]
        if not any(over):
            plans = zip(found.stages, waiting, limits, strict=True)
            return replace(found, stages=tuple(_with(stage, w, limit) for stage, w, limit in plans))
        reserved = [
            (limit or 0) - (stage.bytes - o) if o else r  # what it takes now, less what is too much
            for r, o, stage, limit in zip(reserved, over, found.stages, limits, strict=True)
        ]
    if keep is None:  # what no reserve led to: nothing kept, where backwards are slower and gradients come later
        return solve_with_queues(
            costs,
            stages,
            micro_batches=micro_batches,
            memory_limit=memory_limit,
            keep=[0] * stages,
            input_bytes=input_bytes,
        )
    raise ValueError(
        f"memory_limit: a division fits ({', '.join(map(str, found.balance))} cells), but not with the gradients that "
        f"would wait at its slower stages, {max(over)} bytes more: raise the limit by as much, or use fewer stages"
    )


def waiting_bytes(partition: Partition, costs: Sequence[CellCost], input_bytes: int) -> list[int]:
    """Per stage the bytes of waiting gradients at their worst moment, less what its backwards have freed by then."""
    schedule = schedules.with_recompute(
        schedules.gpipe(len(partition.stages), partition.micro_batches), list(partition.keep)
    )
    spent = [StageCost(s.forward_seconds, s.backward_seconds, 0.0) for s in partition.stages]
    spans = {a: (start, end) for worker in simulate(schedule, spent).workers for a, start, end in worker}
    last_first = range(partition.micro_batches)[::-1]
    found, end = [], 0
    for k, stage in enumerate(partition.stages):
        end += stage.cells
        if k + 1 == len(partition.stages):
            found.append(0)
            continue
        arrived = [spans[Action(k + 1, Kind.BACKWARD, m)][1] for m in last_first]
        done = [spans[Action(k, Kind.BACKWARD, m)][1] for m in last_first]
        entering = costs[end - stage.cells - 1].boundary_bytes if k else input_bytes
        found.append(_worst(arrived, done, costs[end - 1].boundary_bytes, entering, stage))
    return found


def _worst(arrived: list[float], done: list[float], gradient: int, entering: int, stage: StagePlan) -> int:
    """The gradient of the backward that runs is in the account already."""
    worst, there = 0, 0
    for i, now in enumerate(done):
        while there < len(arrived) and arrived[there] < now * (1 - _ROUNDING):
            there += 1
        freed = i * entering + min(i, max(stage.keep - 1, 0)) * stage.further_bytes
        worst = max(worst, (there - i - 1) * gradient - freed)
    return worst


def _solved(
    costs: Sequence[CellCost],
    stages: int,
    micro_batches: int,
    limits: Any,
    keep: Any,
    input_bytes: int,
    reserved: Sequence[int],
) -> Partition:
    try:
        return solve(
            costs, stages, micro_batches=micro_batches, memory_limit=limits, keep=keep, input_bytes=input_bytes
        )
    except Infeasible as error:
        if any(reserved):
            error.add_note(
                f"gpipe: {list(reserved)} bytes of the limits are kept for gradients that wait at slow stages"
            )
        raise


def _with(stage: StagePlan, waiting: int, limit: int | None) -> StagePlan:
    return replace(stage, input_bytes=stage.input_bytes + waiting, memory_limit=limit)
