"""Channels between the ranks of a torch.distributed world.

A route joins a stage (or, for control, a rank) to another on another rank, in one direction, and has a tag of its own.
Opposite directions have a process group each: what goes forward never waits for what goes backward. Between stages
with an accelerator of their own a route also has a communicator of these, on which the thread that uses the transport
issues all sends and receives, in the order that all ranks follow (``message_order.py``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

from gpipe.metering import Meters
from gpipe.ranks.message_order import Passing
from gpipe.ranks.receiving import Incoming, Landing
from gpipe.ranks.routes import Route
from gpipe.ranks.sending import Outgoing
from gpipe.transport import Aborted, Channel, Direction, channel_to


class Lane(Enum):
    """What ranks, not stages, tell each other."""

    START = "start"  # down the relay's tree: which step begins, with how many rows
    DONE = "done"  # up the tree: the parts of the sender and of all behind it are done
    ALL_DONE = "all done"  # down the tree: so is everybody's
    PARTS = "parts"  # to a shared parameter's owner: what cells gave to its gradient
    TOTAL = "total"  # from its owner: the sum


_PATIENCE = 5.0  # seconds for a group to abort
_PAUSE = 1e-3  # seconds between two looks whether all is still

Key = tuple[int, int, Direction | Lane]  # between stages, or between ranks


class Wires:
    """The ends on this rank of all routes; they last as long as the pipe.

    Args:
        rank: This rank.
        routes: All routes of the pipeline by their key, the same on every rank.
    """

    def __init__(self, rank: int, routes: dict[Key, Route]) -> None:
        self._lost: Callable[[BaseException], None] = lambda error: None
        self._accelerated = [r.direct.group for r in routes.values() if r.direct is not None]
        self._groups = list({id(r.group): r.group for r in routes.values()}.values())
        self.outgoing = {k: Outgoing(r, self._on_loss) for k, r in routes.items() if r.source == rank}
        self.incoming = {k: Incoming(r, self._on_loss) for k, r in routes.items() if r.target == rank}
        self.straight = frozenset(k for k, r in routes.items() if r.direct is not None and rank in (r.source, r.target))
        """Keys of the routes at whose ends this rank stands and that join accelerators."""
        self._broken = False
        ends: list[Outgoing | Incoming] = [*self.outgoing.values(), *self.incoming.values()]
        self._busy = [end.busy for end in ends]

    def take_in(self, group: dist.ProcessGroup, accelerated: bool, busy: Callable[[], bool]) -> None:
        """End another group together with those of the routes.

        Args:
            group: The group.
            accelerated: Whether it is to be aborted when a call fails, as it carries tensors between accelerators.
            busy: Whether something is under way there.
        """
        (self._accelerated if accelerated else self._groups).append(group)
        self._busy.append(busy)

    @property
    def threads(self) -> list[threading.Thread]:
        """What sends and receives in the background."""
        ends: list[Outgoing | Incoming] = [*self.outgoing.values(), *self.incoming.values()]
        return [end.thread for end in ends]

    def connect(self, on_loss: Callable[[BaseException], None]) -> None:
        """Whom to tell of a lost connection."""
        self._lost = on_loss

    def give_up(self) -> None:
        """Release all that wait for this rank: what is on its way arrives, then nothing more."""
        if not self._broken:
            self._broken = True
            _abort(self._accelerated)
            for out in self.outgoing.values():
                out.stop()
            for into in self.incoming.values():
                into.drain()

    def close(self) -> None:
        """Let the threads end."""
        for out in self.outgoing.values():
            out.close()
        for into in self.incoming.values():
            into.close()

    def destroy(self, deadline: float) -> None:
        """Destroy the groups, once the threads have ended.

        Args:
            deadline: Until when to wait for what is still under way, by ``time.monotonic()``.
        """
        while not self._broken and any(busy() for busy in self._busy) and time.monotonic() < deadline:
            time.sleep(_PAUSE)
        _abort(self._accelerated)  # to destroy alone might wait for the other ranks, which close when they like
        alive = any(thread.is_alive() for thread in self.threads)
        for group in [*self._accelerated, *(() if alive else self._groups)]:
            with suppress(ValueError, RuntimeError, AssertionError):  # torch.distributed has ended before
                dist.destroy_process_group(group)

    def _on_loss(self, error: BaseException) -> None:
        if not self._broken:
            self._lost(error)


def _abort(groups: Sequence[dist.ProcessGroup]) -> None:
    """End what waits on accelerators for other ranks, on all groups at once: one might wait for another to end."""
    threads = [threading.Thread(target=_abort_one, args=(group,), name="gpipe-abort", daemon=True) for group in groups]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:  # the interpreter ends, and has no more threads
        for group in groups:
            _abort_one(group)
        return
    deadline = time.monotonic() + _PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _abort_one(group: dist.ProcessGroup) -> None:
    with suppress(RuntimeError):  # it may have ended before
        group.abort()


class GroupTransport:
    """The channels of one mini-batch: over ``wires`` to other ranks; in memory between this one's stages and caller.

    Args:
        wires: The routes.
    """

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._aborted = False
        self._gone: SimpleQueue[None] = SimpleQueue()
        self._channels: dict[Key, Channel] = {}
        self._used: set[Key] = set()
        self._order: deque[Passing] = deque()  # of what remains to be issued between accelerators
        self._ahead: set[tuple[int, int, Direction | Lane, int]] = set()  # what was issued before it was asked for
        self.loss: BaseException | None = None
        self._straight = wires.straight
        wires.connect(self._on_loss)

    def open(self, key: Key, expected: int = 0, meters: Meters | None = None) -> None:
        """Make ready for messages: from another rank so many, or any number that stay on this one.

        Args:
            key: Whose messages to whom.
            expected: How many come from another rank.
            meters: Count what comes for a stage.
        """
        self._channels[key] = channel_to(key[1], meters)
        if expected:
            self._wires.incoming[key].expect(expected, self._channels[key])

    def connect(self, source: int, target: int, direction: Direction, channel: Channel) -> None:
        """Let ``channel`` carry these messages, which stay on this rank."""
        self._channels[source, target, direction] = channel

    def follow(self, order: Callable[[], Iterable[Passing]]) -> None:
        """Issue what passes between accelerators in this order; called, where there is such, before every pass.

        Args:
            order: All messages of the pass, the same on every rank.
        """
        if self._straight:
            self._order.extend(p for p in order() if p[:3] in self._straight)

    def send(self, source: int, target: int, direction: Direction | Lane, micro_batch: int, message: Any) -> None:
        """Hand a message over; for another rank it starts on its way.

        Raises:
            Aborted: The mini-batch was given up. ConnectionLost: The other rank is gone.
        """
        self.check()
        key = source, target, direction
        if key in self._channels:
            self._channels[key].put(micro_batch, message)
            return
        self._used.add(key)
        if key in self._straight:
            self._issue_until((*key, micro_batch))
        self._wires.outgoing[key].send(micro_batch, message)

    def receive(self, source: int, target: int, direction: Direction | Lane, micro_batch: int) -> Any:
        """Wait for a message; on an accelerator the current stream does, and the host for its announcement alone.

        Raises:
            Aborted: The mini-batch was given up.
        """
        self.check()
        key = source, target, direction
        if key in self._straight:
            self._issue_until((*key, micro_batch))
        message = self._channels[key].take(micro_batch)
        if self._straight:
            self._issue_ahead()
        return message.landed() if isinstance(message, Landing) else message

    def check(self) -> None:
        """Raise ``Aborted`` if the mini-batch was given up."""
        if self._aborted:
            raise Aborted

    def flush(self) -> None:
        """Wait until all that was sent has gone.

        Raises:
            Aborted: The mini-batch was given up.
        """
        for key in self._used:
            self._wires.outgoing[key].after(lambda: self._gone.put(None))
        for _ in self._used:
            self._gone.get()
            if self._aborted:
                raise Aborted

    def abort(self) -> None:
        """Wake everyone who waits, here and, for messages of this rank, elsewhere."""
        self._aborted = True
        for channel in list(self._channels.values()):
            channel.close()
        self._gone.put(None)
        self._wires.give_up()

    def _issue_until(self, wanted: tuple[int, int, Direction | Lane, int]) -> None:
        """Issue all receives that come before a message, and the message itself if it is received."""
        while wanted not in self._ahead:
            following = self._order.popleft()
            if following[:3] in self._wires.incoming:
                self._wires.incoming[following[:3]].issue()
                self._ahead.add(following)
            else:
                assert following == wanted, f"{following} is to be sent before {wanted}"
                return
        self._ahead.remove(wanted)

    def _issue_ahead(self) -> None:
        """Issue the receives that come next and need not be waited for."""
        while self._order and self._order[0][:3] in self._wires.incoming:
            incoming = self._wires.incoming[self._order[0][:3]]
            if not incoming.ready():
                return
            self._ahead.add(self._order.popleft())
            incoming.issue()

    def _on_loss(self, error: BaseException) -> None:
        self.loss = self.loss or error
        self.abort()
