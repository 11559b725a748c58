"""When every action of a schedule runs, and what memory that takes: a step predicted from costs.

Every worker performs its actions in order, each as soon as the worker is free and the message it needs has arrived. The
simulator goes through the actions step by step, all workers at a time: those of a step depend on earlier steps alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpipe.actions import B, F, I, R, W
from gpipe.costs import Link, SkipIn, StageCost, seconds, stage_costs, stage_links, whole_bytes
from gpipe.order import NEVER, Order
from gpipe.schedule import Schedule
from gpipe.timeline import Flush, Memory, Spans, Timeline, Transfers

__all__ = ["StageCost", "simulate"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_FORWARD, _BACKWARD = 0, 1  # to the stage after, to the stage before
_SENDS = np.array([kind in (F, B, I) for kind in range(5)])
_DIRECTION = np.array([_FORWARD if kind == F else _BACKWARD for kind in range(5)])


def simulate(
    schedule: Schedule,
    costs: StageCost | Sequence[StageCost],
    links: Link | Sequence[Link] | None = None,
    *,
    input_bytes: int = 0,
    static_bytes_per_param: float = 4.0,
    all_reduce_seconds: float = 0.0,
    optimizer_seconds: float = 0.0,
) -> Timeline:
    """Predict a training step.

    A message leaves when its action has ended and the link is free, occupies the link for bytes / bandwidth, and
    arrives latency later. Each two neighbouring stages have a link of their own, and each direction is independent;
    stages on the same worker hand over at no cost. Links do not slow computation down. What skips stages goes over the
    links of all stages on its way, together with their outputs.

    A stage holds ``static_bytes_per_param`` times its parameters, of which the gradients from the end of its first B or
    I on, as after ``zero_grad()``; the input of a micro-batch from its arrival until its B or I has ended (the first
    stage all of them from time 0); activations from the start of F, or of R where the micro-batch is recomputed, until
    B or W has ended; those of a forward that drops them while it runs; the gradient of its output from its arrival
    until B or I starts; and its workspace while it runs an action. What skips stages is held by the one that takes it,
    from the end of the F that gives it until the end of the F or R that records it, and what autograd keeps of it until
    B or I has ended; from then on its gradient by the one that gave it, until B or I has ended there too.

    Args:
        schedule: What the workers do.
        costs: One per stage, or one for all.
        links: (latency in seconds, bandwidth in bytes per second) of all links, or a pair for every two neighbouring
            stages, from the first on. None: messages take no time.
        input_bytes: One micro-batch of the model's input.
        static_bytes_per_param: Bytes held per byte of parameter, as for ``gpipe.partitioning.solve``: 1 for the
            parameter, 1 for its gradient, and the optimizer's state: 2.0 for plain SGD, 4.0 for Adam.
        all_reduce_seconds: Of every worker at the flush, after its last action.
        optimizer_seconds: Of every worker after that.

    Returns:
        The timeline, from time 0.

    Raises:
        ScheduleError: The schedule cannot be run.
        TypeError, ValueError: An argument is not what is described here; the message says what to do.
    """
    order = schedule.validate().order
    per_stage = stage_costs(costs, schedule.stages)
    factor = seconds("static_bytes_per_param", static_bytes_per_param)
    entering = whole_bytes("input_bytes", input_bytes)
    all_reduce = seconds("all_reduce_seconds", all_reduce_seconds)
    optimizer = seconds("optimizer_seconds", optimizer_seconds)
    wires = _wires(order, per_stage, stage_links(links, schedule.stages))
    run = _performed(order, _seconds(per_stage), wires)
    return Timeline(
        workers=tuple(
            Spans(*order.actions[begin:end].columns, run.start[begin:end], run.end[begin:end])
            for begin, end in pairwise(order.first.tolist())
        ),
        transfers=_transfers(order, run, wires),
        flush=_flush(order, run, all_reduce, optimizer),
        memory=_memory(order, run, per_stage, entering, factor),
    )


@dataclass(frozen=True, eq=False)
class _Wires:
    """The links; all arrays have shape (2, K): by direction, by the stage that sends."""

    occupied: Floats
    latency: Floats
    real: NDArray[np.bool_]  # whether the message leaves its worker


@dataclass(frozen=True, eq=False)
class _Run:
    """When every action ran, and when what it sent left its stage and arrived; all of shape (N,)."""

    start: Floats
    end: Floats
    left: Floats
    arrived: Floats


def _seconds(costs: Sequence[StageCost]) -> Floats:
    """Of every kind on every stage, shape (5, K)."""
    table = np.zeros((5, len(costs)))
    table[F] = table[R] = [cost.forward_seconds for cost in costs]
    table[I] = [cost.input_gradient_seconds for cost in costs]
    table[W] = [cost.weight_gradient_seconds for cost in costs]
    table[B] = table[I] + table[W]
    return table


def _wires(order: Order, costs: Sequence[StageCost], links: Sequence[Link] | None) -> _Wires | None:
    if links is None:
        return None
    host = np.zeros(len(costs), dtype=np.int64)
    host[order.actions.stage] = _worker(order)
    wires = _Wires(*(np.zeros((2, len(costs)), dtype=kind) for kind in (float, float, bool)))
    skipping = _skipping(costs)
    for k, (latency, bandwidth) in enumerate(links):
        if host[k] != host[k + 1]:
            ends = ([_FORWARD, _BACKWARD], [k, k + 1])
            wires.occupied[ends] = (costs[k].boundary_bytes + skipping[k]) / bandwidth
            wires.latency[ends] = latency
            wires.real[ends] = True
    return wires


def _skipping(costs: Sequence[StageCost]) -> list[int]:
    """Per stage the bytes that come from it or from stages before, and go beyond it, beside its output."""
    passing = [0] * len(costs)
    for k, cost in enumerate(costs):
        for skip in cost.skips:
            for between in range(skip.source, k):
                passing[between] += skip.value_bytes
    return passing


def _worker(order: Order) -> Ints:
    return np.repeat(np.arange(len(order.first) - 1), np.diff(order.first))


def _performed(order: Order, table: Floats, wires: _Wires | None) -> _Run:
    """The longest path to every action, step by step."""
    actions, count = order.actions, len(order.actions)
    lasting, worker = table[actions.kind, actions.stage], _worker(order)
    start, end = np.zeros(count), np.zeros(count)
    left = np.zeros(count if wires else 0)
    arrived = np.zeros(count + 1)  # the last entry stands for actions that need no message
    clock, free = np.zeros(len(order.first) - 1), np.zeros((2, table.shape[1]))
    by_step = np.argsort(order.step, kind="stable")
    begin = 0
    for bound in np.cumsum(np.bincount(order.step)).tolist():
        here = by_step[begin:bound]
        begin = bound
        who = worker[here]
        starts = np.maximum(clock[who], arrived[order.other[here]])
        ends = starts + lasting[here]
        start[here], end[here], clock[who] = starts, ends, ends
        if wires is None:
            arrived[here] = ends
        else:
            kind, stage = actions.kind[here], actions.stage[here]
            sends = _SENDS[kind]
            place = (_DIRECTION[kind[sends]], stage[sends])
            leaves = np.maximum(ends[sends], free[place])
            free[place] = leaves + wires.occupied[place]
            left[here[sends]] = leaves
            arrived[here[sends]] = free[place] + wires.latency[place]
    return _Run(start, end, left, arrived[:count])


def _transfers(order: Order, run: _Run, wires: _Wires | None) -> Transfers:
    if wires is None:
        return Transfers.of(())
    actions = order.actions
    sent = np.flatnonzero(_SENDS[actions.kind] & wires.real[_DIRECTION[actions.kind], actions.stage])
    direction, source = _DIRECTION[actions.kind[sent]], actions.stage[sent]
    target = source + np.where(direction == _FORWARD, 1, -1)
    return Transfers(source, target, direction, actions.micro_batch[sent], run.left[sent], run.arrived[sent])


def _flush(order: Order, run: _Run, all_reduce: float, optimizer: float) -> tuple[Flush, ...]:
    """What every worker does after its last action, where that takes time."""
    flush = []
    for worker, (begin, end) in enumerate(pairwise(order.first.tolist())):
        now = float(run.end[begin:end].max(initial=0))
        for name, lasting in (("all_reduce", all_reduce), ("optimizer", optimizer)):
            if lasting:
                flush.append(Flush(worker, name, now, now + lasting))
                now += lasting
    return tuple(flush)


def _memory(order: Order, run: _Run, costs: Sequence[StageCost], input_bytes: int, factor: float) -> tuple[Memory, ...]:
    entering = [input_bytes, *(cost.boundary_bytes for cost in costs)]
    gradients = min(max(factor - 1, 0.0), 1.0)  # of the factor, the part that is there only once they are made
    memory = []
    skipping = [hold for k, cost in enumerate(costs) for skip in cost.skips for hold in _skips(order, run, k, skip)]
    for k, cost in enumerate(costs):
        made = math.floor(gradients * cost.parameter_bytes)
        holds = _holds(order, run, k, entering[k], cost, k + 1 == len(costs))
        holds += [hold for stage, hold in skipping if stage == k]
        static = math.ceil(factor * cost.parameter_bytes) - made
        kept = [(_first_backward(order, run, k), made)]
        memory.append(Memory.of_changes(static, [hold for hold in holds if hold[2]], kept))
    return tuple(memory)


def _first_backward(order: Order, run: _Run, k: int) -> float:
    """When the first backward of a stage, or the first part of one, has ended."""
    at = order.at[[B, I], k]
    return float(run.end[at[at != NEVER]].min())


_Hold = tuple[Floats, Floats, int]
"""From when, until when, and how many bytes; an entry per micro-batch."""


def _skips(order: Order, run: _Run, k: int, skip: SkipIn) -> list[tuple[int, _Hold]]:
    """What is held, and by which stage, because ``k`` gets something from a stage further back."""
    at, source = order.at[:, k], order.at[:, skip.source]
    used = run.end[np.where(at[R] == NEVER, at[F], at[R])]
    done = run.end[_backwards(at)]
    again = at[F][at[R] != NEVER]  # such a forward works on a copy
    return [
        (k, (run.end[source[F]], used, skip.value_bytes)),
        (k, (used, done, skip.kept_bytes)),
        (skip.source, (done, run.end[_backwards(source)], skip.gradient_bytes)),
        (k, (run.start[again], run.end[again], skip.value_bytes)),
    ]


def _backwards(at: NDArray[np.int32]) -> NDArray[np.int32]:
    """Of every micro-batch the B or I on a stage."""
    found: NDArray[np.int32] = np.where(at[B] == NEVER, at[I], at[B])
    return found


def _holds(order: Order, run: _Run, k: int, entering: int, cost: StageCost, last: bool) -> list[_Hold]:
    """What stage ``k`` holds beside its parameters and what skips stages."""
    at = order.at[:, k]
    backward = _backwards(at)
    done = run.end[np.where(at[W] == NEVER, at[B], at[W])]
    dropped = at[R] != NEVER
    again = at[F][dropped]
    arrived = run.arrived[order.at[F, k - 1]] if k else np.zeros(len(backward))
    holds = [
        (arrived, run.end[backward], entering),
        (run.start[np.where(dropped, at[R], at[F])], done, cost.activation_bytes),
        (run.start[again], run.end[again], cost.activation_bytes),
    ]
    if cost.workspace_bytes:
        own = order.actions.stage == k
        holds.append((run.start[own], run.end[own], cost.workspace_bytes))
    if not last:
        holds.append((run.arrived[order.other[backward]], run.start[backward], cost.boundary_bytes))
    return holds
