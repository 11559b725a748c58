"""Channels between stages.

A channel is keyed by (source stage, target stage, direction); the caller is the source of the first stage and the
target of the last. Messages carry their micro-batch, so sender and receiver need not agree on an order.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch

from gpipe import lanes
from gpipe.boundary import Boundary, Gradients, map_message
from gpipe.metering import Meters

CALLER = -1


class Direction(StrEnum):
    """Outputs flow forward, their gradients backward; so do values that skip stages."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SKIP_FORWARD = "skip forward"
    SKIP_BACKWARD = "skip backward"


class Aborted(BaseException):
    """Another worker failed; this one has nothing left to wait for. Never reaches the user."""


class Transport(Protocol):
    """Carries messages between the stages of one mini-batch."""

    def send(self, source: int, target: int, direction: Direction, micro_batch: int, message: Any) -> None:
        """Hand a message over without waiting for its receiver."""

    def receive(self, source: int, target: int, direction: Direction, micro_batch: int) -> Any:
        """Wait for a message.

        Raises:
            Aborted: The mini-batch was given up.
        """

    def abort(self) -> None:
        """Wake everyone who waits."""


class Channel:
    """Messages from one thread to one other, taken by micro-batch."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
        self._early: dict[int, Any] = {}

    def put(self, micro_batch: int, message: Any) -> None:
        """Hand a message over."""
        self._queue.put((micro_batch, message))

    def take(self, micro_batch: int) -> Any:
        """Wait for a micro-batch's message; raises ``Aborted`` once the channel is closed."""
        while micro_batch not in self._early:
            item = self._queue.get()
            if item is None:
                raise Aborted
            self._early[item[0]] = item[1]
        return self._early.pop(micro_batch)

    def close(self) -> None:
        """Wake the one who waits."""
        self._queue.put(None)


class MeteredChannel(Channel):
    """Counts what waits in it, and then is taken, as held by the stage it is for."""

    def __init__(self, meters: Meters, stage: int) -> None:
        super().__init__()
        self._delivered = partial(meters.delivered, stage)

    def put(self, micro_batch: int, message: Any) -> None:
        """Hand a message over."""
        super().put(micro_batch, map_message(message, self._delivered))


def channel_to(stage: int, meters: Meters | None) -> Channel:
    """A channel to a stage or the caller, which ``meters``, if there are any, do not count for."""
    return Channel() if meters is None or stage == CALLER else MeteredChannel(meters, stage)


class Supply(Channel):
    """The inputs of two passes: the first stage gets a copy when it takes one, so that none wait in memory.

    Args:
        inputs: By micro-batch.
        meters: Count the copies.
    """

    def __init__(self, inputs: Sequence[Boundary], meters: Meters | None) -> None:
        super().__init__()
        self._inputs, self._meters = inputs, meters
        self._versions = [boundary.versions() for boundary in inputs]

    def take(self, micro_batch: int) -> Any:
        """A copy of a micro-batch's input.

        Raises:
            RuntimeError: It was modified since the first pass began.
        """
        boundary = self._inputs[micro_batch]
        if boundary.versions() != self._versions[micro_batch]:
            raise RuntimeError(
                "the inputs were modified in place after the first of two passes: let loss_fn modify a clone, or leave "
                "two_pass out"
            )
        return boundary.copy() if self._meters is None else boundary.map(partial(self._meters.delivered, 0))


class Drain(Channel):
    """What the last stage has for a caller that does not need it."""

    def put(self, micro_batch: int, message: Any) -> None:
        """Let go of a message."""


class ThreadTransport:
    """Channels between threads of one process.

    Every thread uses the caller's current streams, so a tensor is ready for whatever its receiver launches. Copies
    between accelerators have lanes of their own (``lanes.py``): a receiver waits for one where it takes the message.

    Args:
        devices: The device of every stage; tensors that live on the sender's arrive on the receiver's.
        skips: Source and target stage of the values that skip stages.
        meters: Count what arrives.
    """

    def __init__(
        self, devices: Sequence[torch.device], skips: Sequence[tuple[int, int]] = (), meters: Meters | None = None
    ) -> None:
        self._devices = devices
        self._aborted = False
        last = len(devices) - 1
        pairs = [(CALLER, 0), *((k, k + 1) for k in range(last)), (last, CALLER)]
        self._channels = {
            **{(a, b, Direction.FORWARD): channel_to(b, meters) for a, b in pairs},
            **{(b, a, Direction.BACKWARD): channel_to(a, meters) for a, b in pairs},
            **{(a, b, Direction.SKIP_FORWARD): channel_to(b, meters) for a, b in skips},
            **{(b, a, Direction.SKIP_BACKWARD): channel_to(a, meters) for a, b in skips},
        }

    def connect(self, source: int, target: int, direction: Direction, channel: Channel) -> None:
        """Let ``channel`` carry these messages."""
        self._channels[source, target, direction] = channel

    def send(self, source: int, target: int, direction: Direction, micro_batch: int, message: Any) -> None:
        """Hand a message over; tensors for another device start on their way.

        Raises:
            torch.OutOfMemoryError: The receiver's device has no room; a note names it.
        """
        if CALLER not in (source, target) and self._devices[source] != self._devices[target]:
            message = self._sent(message, source, target)
        self._channels[source, target, direction].put(micro_batch, message)

    def receive(self, source: int, target: int, direction: Direction, micro_batch: int) -> Any:
        """Wait for a message, the host for the sender's; the receiver's current stream waits for the tensors.

        Raises:
            Aborted: The mini-batch was given up.
        """
        if self._aborted:
            raise Aborted
        message = self._channels[source, target, direction].take(micro_batch)
        if isinstance(message, _Crossing):
            return _with_leaves(message.frame, message.crossing.landed())
        return message

    def _sent(self, message: Message, source: int, target: int) -> Message | _Crossing:
        """A message whose tensors, those that live with the sender, are or will be with the receiver."""
        leaves = message.leaves if isinstance(message, Boundary) else message
        here, there = self._devices[source], self._devices[target]
        try:
            if lanes.between(here, there):
                return _Crossing(_with_leaves(message, []), lanes.cross(leaves, here, there))
            return _with_leaves(message, lanes.moved(leaves, here, there))
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"gpipe: it is {there}, of stage {target}, that has no room for what stage {source} sends it"
            )
            raise

    def abort(self) -> None:
        """Wake everyone who waits."""
        self._aborted = True
        for channel in self._channels.values():
            channel.close()


Message = Boundary | Gradients


class _Crossing(NamedTuple):
    """A message on its way to another accelerator."""

    frame: Message  # without leaves: what was sent is held no longer than the copies need it
    crossing: lanes.Crossing


def _with_leaves(message: Message, leaves: list[Any]) -> Message:
    return message.with_leaves(tuple(leaves)) if isinstance(message, Boundary) else leaves
