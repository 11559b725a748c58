"""A pipeline schedule as plain data: for every worker the ordered list of actions it performs.

Actions print in the notation of torch.distributed.pipelining, ``[stage][kind][micro-batch]``: ``2F0``.
This module knows neither torch nor how an action is performed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class Kind(StrEnum):
    """What a worker does with one micro-batch on one stage."""

    FORWARD = "F"
    RECOMPUTE = "R"
    BACKWARD = "B"


class Action(NamedTuple):
    """One step of a worker; prints as ``2F0``."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class ScheduleError(ValueError):
    """A schedule that cannot be run: an action is missing, doubled, misordered, or waits for ever."""


@dataclass(frozen=True)
class Schedule:
    """For every worker the ordered actions it performs.

    Attributes:
        name: How the schedule is called in messages.
        stages: Number of stages K.
        micro_batches: Number of micro-batches M.
        workers: Per worker its actions, in order. A worker hosts the stages its actions name.
    """

    name: str
    stages: int
    micro_batches: int
    workers: tuple[tuple[Action, ...], ...]

    @cached_property
    def recomputed(self) -> frozenset[tuple[int, int]]:
        """The (stage, micro-batch) pairs that have a recompute ahead of their backward."""
        return frozenset((a.stage, a.micro_batch) for a in self._actions() if a.kind == Kind.RECOMPUTE)

    @cached_property
    def halves(self) -> tuple[tuple[tuple[Action, ...], ...], tuple[tuple[Action, ...], ...]]:
        """The forward actions of every worker, and all that follows them.

        Raises:
            ScheduleError: A worker has to go forward after it has gone backward, so that the loss of the whole
                mini-batch cannot stand between the two.
        """
        for worker, actions in enumerate(self.workers):
            kinds = [a.kind == Kind.FORWARD for a in actions]
            if kinds != sorted(kinds, reverse=True):
                late = next(
                    a
                    for a, b in zip(actions[1:], actions, strict=False)
                    if a.kind == Kind.FORWARD and b.kind != Kind.FORWARD
                )
                raise ScheduleError(
                    f"schedule {self.name!r} interleaves forward and backward (worker {worker} runs {late} after a "
                    "backward), so no loss over the whole mini-batch exists between them: "
                    "use loss_over='micro_batch' or the schedule 'gpipe'"
                )
        forward = tuple(tuple(a for a in w if a.kind == Kind.FORWARD) for w in self.workers)
        backward = tuple(tuple(a for a in w if a.kind != Kind.FORWARD) for w in self.workers)
        return forward, backward

    def validate(self) -> Schedule:
        """Prove that every F and B happens exactly once and that no worker waits for ever; returns itself.

        Raises:
            ScheduleError: With the offending action and the grid of what could be run.
        """
        self._check_counts()
        steps, blocked = self._walk()
        if blocked:
            unmet = {a: [n for n in self._needs(a) if n not in steps] for a in blocked.values()}
            waits = "; ".join(f"worker {w} at {a} waits for {_text(unmet[a])}" for w, a in blocked.items())
            raise ScheduleError(
                f"schedule {self.name!r} never ends: {waits}. Reorder these actions.\n"
                + self._grid(steps, dict(blocked))
            )
        return self

    def render(self) -> str:
        """A grid, one line a worker, one column a step, every action as early as its order and needs allow."""
        steps, blocked = self._walk()
        return self._grid(steps, dict(blocked))

    def _actions(self) -> Iterator[Action]:
        for actions in self.workers:
            yield from actions

    def _needs(self, action: Action) -> list[Action]:
        """What must have been performed, anywhere, before ``action`` can start."""
        stage, kind, m = action
        if kind == Kind.FORWARD:
            return [Action(stage - 1, Kind.FORWARD, m)] if stage else []
        needs = [Action(stage, Kind.FORWARD, m)]
        if kind == Kind.BACKWARD:
            if stage + 1 < self.stages:
                needs.append(Action(stage + 1, Kind.BACKWARD, m))
            if (stage, m) in self.recomputed:
                needs.append(Action(stage, Kind.RECOMPUTE, m))
        return needs

    def _check_counts(self) -> None:
        counts = Counter(self._actions())
        hosts: dict[int, int] = {}
        for worker, actions in enumerate(self.workers):
            for action in actions:
                self._check_range(worker, action)
                if hosts.setdefault(action.stage, worker) != worker:
                    raise ScheduleError(
                        f"schedule {self.name!r}: {action} is given to worker {worker}, but worker "
                        f"{hosts[action.stage]} hosts stage {action.stage}. Give a stage to one worker."
                    )
        for stage in range(self.stages):
            for m in range(self.micro_batches):
                for kind in (Kind.FORWARD, Kind.BACKWARD):
                    action = Action(stage, kind, m)
                    if not counts[action]:
                        raise ScheduleError(f"schedule {self.name!r}: {action} is missing\n{self._raw_grid()}")
        doubled = [action for action, n in counts.items() if n > 1]
        if doubled:
            raise ScheduleError(
                f"schedule {self.name!r}: {doubled[0]} stands {counts[doubled[0]]} times\n" + self._raw_grid(doubled[0])
            )

    def _check_range(self, worker: int, action: Action) -> None:
        if not (0 <= action.stage < self.stages and 0 <= action.micro_batch < self.micro_batches):
            raise ScheduleError(
                f"schedule {self.name!r}: {action} of worker {worker} is outside {self.stages} stages and "
                f"{self.micro_batches} micro-batches"
            )

    def _walk(self) -> tuple[dict[Action, int], dict[int, Action]]:
        """The earliest step of every action in unit time, and the actions workers are stuck at."""
        needs = {a: self._needs(a) for a in self._actions()}
        steps: dict[Action, int] = {}
        position = [0] * len(self.workers)
        clock = [0] * len(self.workers)
        moved = True
        while moved:
            moved = False
            for w, actions in enumerate(self.workers):
                while position[w] < len(actions) and all(n in steps for n in needs[actions[position[w]]]):
                    action = actions[position[w]]
                    steps[action] = max([clock[w], *(steps[n] + 1 for n in needs[action])])
                    clock[w] = steps[action] + 1
                    position[w] += 1
                    moved = True
        blocked = {w: a[position[w]] for w, a in enumerate(self.workers) if position[w] < len(a)}
        return steps, blocked

    def _grid(self, steps: dict[Action, int], blocked: dict[int, Action]) -> str:
        rows = []
        for w, actions in enumerate(self.workers):
            row: list[str] = []
            for action in actions:
                if action in steps:
                    row += [""] * (steps[action] - len(row))
                    row.append(str(action))
            if w in blocked:
                row.append(f"{blocked[w]}<--")
            rows.append(row)
        return _lines(rows)

    def _raw_grid(self, mark: Action | None = None) -> str:
        return _lines([[f"{a}<--" if a == mark else str(a) for a in actions] for actions in self.workers])


def _text(actions: list[Action]) -> str:
    return ", ".join(map(str, actions))


def _lines(rows: list[list[str]]) -> str:
    width = max((len(cell) for row in rows for cell in row), default=0)
    lines = (f"worker {w}: " + " ".join(cell.ljust(width) for cell in row) for w, row in enumerate(rows))
    return "\n".join(line.rstrip() for line in lines)
