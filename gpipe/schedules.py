"""Builders of schedules: pure functions from numbers to data.

K is the number of stages, M that of micro-batches, F, I and W the seconds of forward, input and weight gradient, B = I
+ W; A one stage's activations of one micro-batch. The bubble of a schedule is its makespan less the work of one worker,
for equal stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpipe.actions import Actions, B, F, I, W
from gpipe.recompute import with_recompute
from gpipe.schedule import Schedule

__all__ = [
    "BUILDERS",
    "Builder",
    "builder",
    "gpipe",
    "gpipe_zero_bubble",
    "interleaved_one_f_one_b",
    "one_f_one_b",
    "with_recompute",
    "zero_bubble_h1",
]


class Builder(Protocol):
    """What makes a schedule of K stages and M micro-batches."""

    def __call__(self, stages: int, micro_batches: int) -> Schedule:
        """The schedule."""


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All micro-batches forward, then all backward, the last first (GPipe, arXiv 1811.06965, section 2.3).

    Bubble (K - 1)(F + B), activations M A.

    Args:
        stages: Number of stages K, at least 0.
        micro_batches: Number of micro-batches M, at least 1.
    """
    _check(stages, micro_batches, least=0)
    forward = np.arange(micro_batches)
    return Schedule(
        "gpipe",
        stages,
        micro_batches,
        tuple(_in_order((F, k, forward), (B, k, forward[::-1])) for k in range(stages)),
    )


def gpipe_zero_bubble(stages: int, micro_batches: int) -> Schedule:
    """GPipe's flush with the weight gradients moved into the drain: all F, then all I, the last first, then all W.

    The stage before waits for I alone, so gradients reach the first stage after K I instead of K B; while they travel,
    the later stages compute their W. No worker waits once its first gradient has come, and none could get it earlier as
    long as the loss needs all micro-batches: bubble (K - 1)(F + I). Activations M A, held longer than under ``gpipe``.
    The split is that of zero bubble pipelines, arXiv 2401.10241, section 2.

    Args:
        stages: Number of stages K, at least 1.
        micro_batches: Number of micro-batches M, at least 1.
    """
    _check(stages, micro_batches)
    forward = np.arange(micro_batches)
    backward = forward[::-1]
    return Schedule(
        "gpipe_zero_bubble",
        stages,
        micro_batches,
        tuple(_in_order((F, k, forward), (I, k, backward), (W, k, backward)) for k in range(stages)),
    )


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """Stage k runs min(K - k, M) forwards, then a backward and a forward in turn, the first micro-batch first.

    PipeDream-Flush, arXiv 2006.09503; arXiv 2104.04473, section 2.2.1. Bubble (K - 1)(F + B), activations
    min(K - k, M) A on stage k.

    Args:
        stages: Number of stages K, at least 1.
        micro_batches: Number of micro-batches M, at least 1.
    """
    _check(stages, micro_batches)
    m = np.arange(micro_batches)
    workers = []
    for k in range(stages):
        turn = np.maximum(m - (stages - k), -1)  # the forward of m follows this backward
        workers.append(_merged((F, k, m, 2 * turn + 1), (B, k, m, 2 * m)))
    return Schedule("one_f_one_b", stages, micro_batches, tuple(workers))


def zero_bubble_h1(stages: int, micro_batches: int) -> Schedule:
    """1F1B with split backward; stage k puts its weight gradients off by k micro-batches (arXiv 2401.10241, ZB-H1).

    Section 2 there. Bubble (K - 1)(F + I - W) if M >= K and neither F nor I is shorter than W; in general
    (K - 1)(F + I) - (min(K, M) - 1) min(F, I, W). Activations min(K, M) A on every stage.

    Args:
        stages: Number of stages K, at least 1.
        micro_batches: Number of micro-batches M, at least 1.
    """
    _check(stages, micro_batches)
    m = np.arange(micro_batches)
    workers = []
    for k in range(stages):
        turn = np.maximum(m - (stages - k), -1)
        workers.append(_merged((F, k, m, 3 * turn + 2), (I, k, m, 3 * m), (W, k, m, 3 * (m + k) + 1)))
    return Schedule("zero_bubble_h1", stages, micro_batches, tuple(workers))


def interleaved_one_f_one_b(stages: int, micro_batches: int, stages_per_worker: int = 2) -> Schedule:
    """1F1B where every worker hosts v stages, worker w the stages w, w + P, w + 2P, ... of P = K / v workers.

    Megatron-LM, arXiv 2104.04473, section 2.2.2: micro-batches go round in groups of P, so that a worker has work on
    its next stage when the group has passed all workers. Bubble (P - 1)(F + B) with F and B of one stage, which is a
    v-th of a worker's share: v times less than 1F1B's. Activations on worker 0 (P v + P - 1) A. Where P does not divide
    M, the M // P groups are as equal as can be, larger ones first; the bubble is then larger than the formula's.

    Args:
        stages: Number of stages K, a multiple of ``stages_per_worker``.
        micro_batches: Number of micro-batches M, at least 1.
        stages_per_worker: v, at least 1.
    """
    _check(stages, micro_batches)
    _check_whole("stages_per_worker", stages_per_worker, 1)
    if stages % stages_per_worker:
        raise ValueError(
            f"stages must be a multiple of stages_per_worker, got {stages} and {stages_per_worker}: "
            f"take {stages - stages % stages_per_worker or stages_per_worker} stages, or another stages_per_worker"
        )
    workers = stages // stages_per_worker
    count = max(1, micro_batches // workers)
    groups = np.array_split(np.arange(micro_batches), count)
    hosted = range(stages_per_worker)
    m = np.concatenate([group for group in groups for _ in hosted])
    forward = np.concatenate([np.full(len(group), v * workers) for group in groups for v in hosted])
    backward = np.concatenate([np.full(len(group), v * workers) for group in groups for v in reversed(hosted)])
    step = np.arange(len(m))
    lists = []
    for w in range(workers):
        warm_up = (stages_per_worker - 1) * len(groups[0]) + 2 * (workers - 1 - w) + 1
        turn = np.maximum(step - warm_up, -1)
        lists.append(_merged((F, forward + w, m, 2 * turn + 1), (B, backward + w, m, 2 * step)))
    return Schedule("interleaved_one_f_one_b", stages, micro_batches, tuple(lists))


BUILDERS: Mapping[str, Builder] = MappingProxyType(
    {
        "gpipe": gpipe,
        "gpipe_zero_bubble": gpipe_zero_bubble,
        "one_f_one_b": one_f_one_b,
        "zero_bubble_h1": zero_bubble_h1,
        "interleaved_one_f_one_b": interleaved_one_f_one_b,
    }
)
"""Builders by name."""


def builder(name: str) -> Builder:
    """The builder called ``name``.

    Raises:
        ValueError: There is none; the message lists the names.
    """
    if not isinstance(name, str) or name not in BUILDERS:
        raise ValueError(f"schedule must be one of {', '.join(map(repr, BUILDERS))}, got {name!r}")
    return BUILDERS[name]


def _check(stages: Any, micro_batches: Any, least: int = 1) -> None:
    _check_whole("stages", stages, least)
    _check_whole("micro_batches", micro_batches, 1)


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least {least}, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _in_order(*parts: tuple[int, int, NDArray[Any]]) -> Actions:
    """The actions of (kind, stage, micro-batches), part after part."""
    return _joined([(kind, stage, m) for kind, stage, m in parts])


def _merged(*parts: tuple[int, int | NDArray[Any], NDArray[Any], NDArray[Any]]) -> Actions:
    """The actions of (kind, stages, micro-batches, keys) by rising key; equal keys keep their order."""
    order = np.argsort(np.concatenate([key for *_, key in parts]), kind="stable")
    actions = _joined([(kind, stage, m) for kind, stage, m, _ in parts])
    return Actions(*(column[order] for column in actions.columns))


def _joined(parts: Sequence[tuple[int, int | NDArray[Any], NDArray[Any]]]) -> Actions:
    return Actions(
        np.concatenate([np.broadcast_to(stage, m.shape) for _, stage, m in parts]),
        np.concatenate([np.full(m.shape, kind) for kind, _, m in parts]),
        np.concatenate([m for *_, m in parts]),
    )
