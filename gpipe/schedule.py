"""A pipeline schedule as plain data: for every worker the ordered list of actions it performs.

Actions print in the notation of torch.distributed.pipelining, ``[stage][kind][micro-batch]``: ``2F0``.
This module knows neither torch nor how an action is performed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from gpipe import grid, notation
from gpipe.actions import Action, Actions, F, Kind, R, ScheduleError
from gpipe.legality import check_places, check_presence
from gpipe.order import Order

__all__ = ["Action", "Actions", "Kind", "Schedule", "ScheduleError"]

_NAMED = 8  # workers in a message


@dataclass(frozen=True)
class Schedule:
    """For every worker the ordered actions it performs.

    A micro-batch passes each stage as F, then either B, or I and later W; an R between F and its backward says that F
    drops the activations and R makes them again. Constructing checks types alone; ``validate`` proves the rest.

    Attributes:
        name: How the schedule is called in messages.
        stages: Number of stages K.
        micro_batches: Number of micro-batches M.
        workers: Per worker its actions, in order. A worker hosts the stages its actions name. Any sequences of
            ``Action`` may be given; they are held as ``Actions``, which compare by what they contain.

    Raises:
        ScheduleError: Something in ``workers`` is no action, or K and M are no sensible numbers.
    """

    name: str
    stages: int
    micro_batches: int
    workers: tuple[Sequence[Action], ...]

    def __post_init__(self) -> None:
        for name, value, least in (("stages", self.stages, 0), ("micro_batches", self.micro_batches, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ScheduleError(f"schedule {self.name!r}: {name} must be an int of at least {least}, got {value!r}")
        try:
            compact = tuple(Actions.of(actions) for actions in self.workers)
        except ScheduleError as error:
            raise ScheduleError(f"schedule {self.name!r}: {error}") from None
        object.__setattr__(self, "workers", compact)

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.__dataclass_fields__}  # what is cached can be found again

    @cached_property
    def recomputed(self) -> frozenset[tuple[int, int]]:
        """The (stage, micro-batch) pairs that have a recompute ahead of their backward."""
        pairs: set[tuple[int, int]] = set()
        for actions in self._workers:
            here = actions.kind == R
            pairs.update(zip(actions.stage[here].tolist(), actions.micro_batch[here].tolist(), strict=True))
        return frozenset(pairs)

    @cached_property
    def halves(self) -> tuple[tuple[Sequence[Action], ...], tuple[Sequence[Action], ...]]:
        """The forward actions of every worker, and all that follows them.

        Raises:
            ScheduleError: A worker has to go forward after it has gone backward, so that the loss of the whole
                mini-batch cannot stand between the two.
        """
        counts = []
        for worker, actions in enumerate(self._workers):
            forward = actions.kind == F
            counts.append(int(forward.sum()))
            late = np.flatnonzero(forward[1:] & ~forward[:-1])
            if len(late):
                raise ScheduleError(
                    f"schedule {self.name!r} interleaves forward and backward (worker {worker} runs "
                    f"{actions[late[0] + 1]} after a backward), so no loss over the whole mini-batch exists between "
                    "them: use loss_over='micro_batch', or two_pass=True, or a schedule that runs all forwards first "
                    "('gpipe', 'gpipe_zero_bubble')"
                )
        return (
            tuple(actions[:n] for n, actions in zip(counts, self._workers, strict=True)),
            tuple(actions[n:] for n, actions in zip(counts, self._workers, strict=True)),
        )

    def validate(self) -> Schedule:
        """Prove that every forward and backward happens exactly once and that no worker waits for ever; returns itself.

        Raises:
            ScheduleError: With the offending action and the grid around it.
        """
        check_places(self.name, self.stages, self.micro_batches, self._workers)
        check_presence(self.name, self.stages, self.micro_batches, self._workers)
        stuck = self.order.stuck()
        if stuck:
            cause = self.order.cycle(stuck)
            named = sorted(stuck) if len(stuck) <= _NAMED else cause[:_NAMED]
            waits = "; ".join(self._wait(worker, stuck[worker]) for worker in named)
            more = f"; {len(stuck) - len(named)} other workers wait too" if len(stuck) > len(named) else ""
            raise ScheduleError(
                f"schedule {self.name!r} never ends: {waits}{more}. Reorder these actions.\n"
                + grid.around(self.order, cause[0])
            )
        return self

    def render(self) -> str:
        """A grid, one line a worker, one column a step, every action as early as its order and needs allow."""
        return grid.by_step(self.order)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the schedule as torch.distributed.pipelining does: a line a rank, its actions ``0F0,0F1,0B1,0B0``.

        torch's ``_load_csv(path, format="compute_only")`` reads the file. Recompute, ``0R1``, is ours: torch's actions
        know no such kind, and its reader refuses a file that holds one.
        """
        notation.write(path, self.workers)

    @classmethod
    def from_csv(cls, path: str | PathLike[str], name: str | None = None) -> Schedule:
        """Read a file of ``to_csv``, or of torch's ``_dump_csv(path, format="compute_only")``; validates it.

        Empty cells, which torch writes for steps without work, are left out; of an overlapped pair
        ``(0F1;3B0)OVERLAP_F_B`` the actions are taken one after the other.

        Args:
            path: The file.
            name: How the schedule is called in messages; None takes the file's.

        Raises:
            ScheduleError: A cell is no computation, or the schedule cannot be run.
        """
        stem, workers = notation.read(path)
        every = [action for actions in workers for action in actions]
        stages, micro_batches = 1 + max(a.stage for a in every), 1 + max(a.micro_batch for a in every)
        return cls(stem if name is None else name, stages, micro_batches, tuple(workers)).validate()

    @cached_property
    def order(self) -> Order:
        """What every action waits for, and the earliest step it can run at."""
        check_places(self.name, self.stages, self.micro_batches, self._workers)
        return Order.of(self.stages, self.micro_batches, self._workers)

    @property
    def _workers(self) -> tuple[Actions, ...]:
        return self.workers  # type: ignore[return-value]  # __post_init__ made them so

    def _wait(self, worker: int, index: int) -> str:
        order = self.order
        unmet = ", ".join(str(order.actions[n]) for n in order.needs(index))
        return f"worker {worker} at {order.actions[index]} waits for {unmet}"
