"""Gradients that wait at a stage slower than the one after it: what they take, and partitions with room for it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from gpipe import schedules
from gpipe.actions import Action, Kind
from gpipe.costs import StageCost, divided_costs
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
    divided = divided_costs(costs, partition.balance)
    found, end = [], 0
    for k, stage in enumerate(partition.stages):
        end += stage.cells
        if k + 1 == len(partition.stages):
            found.append(0)
            continue
        done = _ends(spans, k, partition.micro_batches)
        entering = costs[end - stage.cells - 1].boundary_bytes if k else input_bytes
        entering += sum(skip.value_bytes for skip in divided[k].skips)
        queues = [_Queue(_ends(spans, k + 1, partition.micro_batches), costs[end - 1].boundary_bytes)]
        queues += [
            _Queue(_ends(spans, target, partition.micro_batches), skip.gradient_bytes)
            for target, cost in enumerate(divided)
            for skip in cost.skips
            if skip.source == k
        ]
        found.append(_worst(queues, done, entering, stage))
    return found


class _Queue(NamedTuple):
    """Gradients that come from one stage: when, and the bytes of one of them."""

    arrived: list[float]
    gradient: int

    def waiting(self, i: int, now: float) -> int:
        """Bytes that wait while backward ``i`` runs, whose own gradient is in the account already."""
        return max(0, bisect_left(self.arrived, now * (1 - _ROUNDING)) - i - 1) * self.gradient


def _ends(spans: Mapping[Action, tuple[float, float]], k: int, micro_batches: int) -> list[float]:
    """When the backwards of stage ``k`` end, the last micro-batch first."""
    return [spans[Action(k, Kind.BACKWARD, m)][1] for m in reversed(range(micro_batches))]


def _worst(queues: Sequence[_Queue], done: Sequence[float], entering: int, stage: StagePlan) -> int:
    worst = 0
    for i, now in enumerate(done):
        freed = i * entering + min(i, max(stage.keep - 1, 0)) * stage.further_bytes
        worst = max(worst, sum(queue.waiting(i, now) for queue in queues) - freed)
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
