"""Which action waits for which, and the earliest step each can run at when every action takes one step.

All actions of a schedule stand in one row, worker after worker; an action is its index there. N is their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpipe.actions import KINDS, Actions, B, F, I, R, W

Indices = NDArray[np.int32]

NEVER = -1
"""The step of an action that waits for ever; the index of an action that is not there."""


@dataclass(frozen=True, eq=False)
class Order:
    """What the actions of a schedule wait for.

    Attributes:
        actions: All of them, worker after worker.
        first: Shape (workers + 1,): index of every worker's first action.
        at: Shape (5, stages, micro-batches): index of the action of a kind, NEVER where there is none.
        own: Shape (N,): index of the action of the same stage that must precede; N if none, N + 1 if it is missing.
        other: Shape (N,): the same for the neighbouring stage, whose message the action waits for.
        step: Shape (N,): the earliest step, NEVER for actions that wait for ever.
    """

    actions: Actions
    first: NDArray[np.int64]
    at: Indices
    own: Indices
    other: Indices
    step: Indices

    @classmethod
    def of(cls, stages: int, micro_batches: int, workers: Sequence[Actions]) -> Order:
        """The order of a schedule whose stages and micro-batches are in range."""
        actions = _joined(workers)
        first = np.concatenate([np.zeros(1, np.int64), np.cumsum([len(w) for w in workers], dtype=np.int64)])
        at = np.full((len(KINDS), stages, micro_batches), NEVER, dtype=np.int32)
        at[actions.kind, actions.stage, actions.micro_batch] = np.arange(len(actions), dtype=np.int32)
        own, other = _needs(actions, at)
        return cls(actions, first, at, own, other, _steps(first, own, other))

    def needs(self, index: int) -> list[int]:
        """Indices of the actions that ``index`` waits for and that are never performed, where they exist."""
        count = len(self.actions)
        needed = {int(self.own[index]), int(self.other[index])} - {count, count + 1}
        return sorted(n for n in needed if self.step[n] == NEVER)

    def stuck(self) -> dict[int, int]:
        """Per worker that never ends the index of the action it is stuck at."""
        found = {}
        for worker, (begin, end) in enumerate(pairwise(self.first.tolist())):
            waiting = np.flatnonzero(self.step[begin:end] == NEVER)
            if len(waiting):
                found[worker] = begin + int(waiting[0])
        return found

    def cycle(self, stuck: Mapping[int, int]) -> list[int]:
        """Workers of ``stuck`` that wait for each other in a circle: the cause, which the rest wait for in turn."""
        chain = [min(stuck)]
        while True:
            needed = self.needs(stuck[chain[-1]])[0]
            worker = int(np.searchsorted(self.first, needed, side="right")) - 1
            if worker in chain:
                return chain[chain.index(worker) :]
            chain.append(worker)


def _joined(workers: Sequence[Actions]) -> Actions:
    if not workers:
        return Actions.of(())
    return Actions(*(np.concatenate(columns) for columns in zip(*(w.columns for w in workers), strict=True)))


def _needs(actions: Actions, at: Indices) -> tuple[Indices, Indices]:
    """For every action what it waits for: on its own stage, and on the neighbouring one."""
    count = len(actions)
    own = np.full(count, count, dtype=np.int32)
    other = np.full(count, count, dtype=np.int32)
    backward = np.where(at[B] == NEVER, at[I], at[B])
    ready = np.where(at[R] == NEVER, at[F], at[R])  # whose end means that the activations are there
    sources = {R: at[F], B: ready, I: ready, W: at[I]}
    for kind in range(len(KINDS)):
        here = np.flatnonzero(actions.kind == kind)
        stage, micro_batch = actions.stage[here], actions.micro_batch[here]
        if kind in sources:
            own[here] = sources[kind][stage, micro_batch]
        if kind == F:
            inner = stage > 0
            other[here[inner]] = at[F][stage[inner] - 1, micro_batch[inner]]
        if kind in (B, I):
            inner = stage < at.shape[1] - 1
            other[here[inner]] = backward[stage[inner] + 1, micro_batch[inner]]
    own[own == NEVER] = count + 1
    other[other == NEVER] = count + 1
    return own, other


def _steps(first: NDArray[np.int64], own: Indices, other: Indices) -> Indices:
    """Step after step, every worker performs its next action if what it waits for has been performed."""
    count = len(own)
    step = np.full(count, NEVER, dtype=np.int32)
    done = np.zeros(count + 2, dtype=bool)
    done[count] = True
    working = first[:-1] < first[1:]
    position, ends = first[:-1][working], first[1:][working]
    now = 0
    while len(position):
        ready = done[own[position]] & done[other[position]]
        performed = position[ready]
        if not len(performed):
            break
        done[performed] = True
        step[performed] = now
        position = position + ready
        now += 1
        going = position < ends
        if not going.all():
            position, ends = position[going], ends[going]
    return step
