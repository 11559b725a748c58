"""Channels between the ranks of a torch.distributed world.

A route joins a stage (or, for control, a rank) to another on another rank, in one direction, and has a tag of its own.
Opposite directions have a process group each: what goes forward never waits for what goes backward. Between stages
with an accelerator of their own a route also has an NCCL communicator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from typing import Any

from gpipe.metering import Meters
from gpipe.ranks.routes import Incoming, Outgoing, Route
from gpipe.transport import Aborted, Channel, Direction, channel_to


class Lane(Enum):
    """What ranks, not stages, tell each other."""

    START = "start"  # down the relay's tree: which step begins, with how many rows
    DONE = "done"  # up the tree: the parts of the sender and of all behind it are done
    ALL_DONE = "all done"  # down the tree: so is everybody's
    PARTS = "parts"  # to a shared parameter's owner: what cells gave to its gradient
    TOTAL = "total"  # from its owner: the sum


Key = tuple[int, int, Direction | Lane]  # between stages, or between ranks


class Wires:
    """The ends on this rank of all routes; they last as long as the pipe.

    Args:
        rank: This rank.
        routes: All routes of the pipeline by their key, the same on every rank.
    """

    def __init__(self, rank: int, routes: dict[Key, Route]) -> None:
        self._lost: Callable[[BaseException], None] = lambda error: None
        self._directs = [r.direct for r in routes.values() if r.direct is not None]
        self.outgoing = {k: Outgoing(r, self._on_loss) for k, r in routes.items() if r.source == rank}
        self.incoming = {k: Incoming(r, self._on_loss) for k, r in routes.items() if r.target == rank}
        self._broken = False

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

    def _on_loss(self, error: BaseException) -> None:
        if not self._broken:
            self._lost(error)
            for direct in self._directs:
                direct.abort()


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
        self.loss: BaseException | None = None
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

    def send(self, source: int, target: int, direction: Direction | Lane, micro_batch: int, message: Any) -> None:
        """Hand a message over; for another rank it starts on its way.

        Raises:
            Aborted: The mini-batch was given up. ConnectionLost: The other rank is gone.
        """
        if self._aborted:
            raise Aborted
        key = source, target, direction
        if key in self._channels:
            self._channels[key].put(micro_batch, message)
        else:
            self._used.add(key)
            self._wires.outgoing[key].send(micro_batch, message)

    def receive(self, source: int, target: int, direction: Direction | Lane, micro_batch: int) -> Any:
        """Wait for a message.

        Raises:
            Aborted: The mini-batch was given up.
        """
        if self._aborted:
            raise Aborted
        return self._channels[source, target, direction].take(micro_batch)

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

    def _on_loss(self, error: BaseException) -> None:
        self.loss = self.loss or error
        self.abort()
