"""In which order the messages of a pass come: one for all ranks, so that each may issue its own in it.

NCCL matches what two ranks exchange by the order in which either issues it, and what waits on an accelerator must not
wait in a circle. A rank that issues its sends and receives in one and the same order of all messages, in which none
comes before what it depends on, is safe from both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gpipe.schedule import Action, Kind
from gpipe.transport import CALLER, Direction
from gpipe.ways import Ways
from gpipe.worker import neighbours

_DURATION = {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: 2, Kind.INPUT_GRADIENT: 1, Kind.WEIGHT_GRADIENT: 1}


class Passing(NamedTuple):
    """A message from a stage to a stage of another worker.

    Attributes:
        source, target: The stages.
        direction: Outputs, gradients, or what skips stages.
        micro_batch: Whose it is.
    """

    source: int
    target: int
    direction: Direction
    micro_batch: int


class _Sent(NamedTuple):
    time: int
    passing: Passing


def message_order(
    workers: Sequence[Sequence[Action]], hosts: Sequence[int], ways: Sequence[Ways], window: int | None = None
) -> list[Passing]:
    """All messages between workers, by when they would be sent if every action took its usual time and messages none.

    Args:
        workers: What every worker does in this pass, in order.
        hosts: For every stage its worker.
        ways: For every stage its skip connections.
        window: As the worker loop has it in the first of two passes: the messages that say a micro-batch was taken are
            among those that come.

    Raises:
        ValueError: The workers wait for each other for ever.
    """
    runs = [_Run(actions, hosts, ways, window) for actions in workers]
    sent: dict[Passing, int] = {}
    order: list[_Sent] = []
    going = True
    while going:
        going = False
        for run in runs:
            for message in run.sends(sent):
                sent[message.passing] = message.time
                order.append(message)
                going = True
            going = going or run.moved
    if any(run.left for run in runs):
        raise ValueError("the schedule's workers wait for each other for ever: validate() says where")
    order.sort(key=lambda message: message.time)  # what depends on a message of the same time stays behind it
    return [passing for _, passing in order if hosts[passing.source] != hosts[passing.target]]


class _Run:
    """A worker on its way through its actions."""

    def __init__(
        self, actions: Sequence[Action], hosts: Sequence[int], ways: Sequence[Ways], window: int | None
    ) -> None:
        self._actions = list(actions)
        self._hosts, self._ways, self._window = hosts, ways, window
        self._next, self._now = 0, 0
        self.moved = False

    @property
    def left(self) -> int:
        """How many actions it has not performed."""
        return len(self._actions) - self._next

    def sends(self, sent: dict[Passing, int]) -> Iterator[_Sent]:
        """What it sends until it has to wait, given what was ``sent`` at which time."""
        self.moved = False
        while self.left:
            stage, kind, m = self._actions[self._next]
            sources, targets = neighbours(stage, kind, len(self._hosts), self._ways[stage])
            needed = [Passing(s, stage, direction, m) for s, direction in sources if s != CALLER]
            after, before = targets[:1], sources[:1]
            if self._window is not None and m >= self._window and after and after[0][0] != CALLER:
                needed.append(Passing(after[0][0], stage, Direction.BACKWARD, m - self._window))
            if any(passing not in sent for passing in needed):
                return
            start = max([self._now, *(sent[passing] for passing in needed)])
            if self._window is not None and before and before[0][0] != CALLER:
                yield _Sent(start, Passing(stage, before[0][0], Direction.BACKWARD, m))  # taken
            self._now = start + _DURATION[kind]
            self._next += 1
            self.moved = True
            for target, direction in targets:
                if target != CALLER:
                    yield _Sent(self._now, Passing(stage, target, direction, m))
