"""The two ends of a route between ranks, over gloo point-to-point messages.

A message begins with a slot of fixed size, for which its receiver waits ahead: numbers, and behind them, where they
fit, the header, sent if it differs from the route's last, and the bytes of the tensors.

Tensors that do not fit follow. As most messages are laid out as the one before, the receiver waits ahead for tensors
of the same sizes too: they travel at once, not only when it has read the slot, which would take the link's latency
twice more. Every slot is therefore followed by as many messages as the route's last message had tensors outside its
slot: tensors, or, where the layout is another, a byte each, since gloo lets a message be shorter than what waits for
it. The tensors of another layout then follow as soon as the receiver is ready for them.

A thread for each incoming route receives while the rank computes; one for each outgoing route keeps what is sent until
it has gone.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.boundary import Boundary
from gpipe.packing import Arrival, Message, pack
from gpipe.transport import Aborted, Channel

_STOP = -1  # in place of a micro-batch: nothing more will come
_NUMBERS = 5 * 8  # bytes: micro-batch, bytes of the header (0: as before), its checksum, number of tensors, their place
_SLOT = 4096  # bytes
_ROOM = _SLOT - _NUMBERS


class _Place(IntEnum):
    """Where the tensors of a message are."""

    SLOT = 0  # behind the header
    AWAITED = 1  # where the receiver waits ahead
    BEHIND = 2  # behind what it waits for ahead


class ConnectionLost(RuntimeError):
    """A rank can no longer be reached."""


@dataclass(frozen=True)
class Route:
    """One way from a rank to another.

    Attributes:
        source, target: Ranks of the world.
        tag: Tells its messages from those of other routes.
        group: What carries them.
        device: Where, at the end of this rank, what is sent lives and what is received is to live.
    """

    source: int
    target: int
    tag: int
    group: dist.ProcessGroup
    device: torch.device

    def send(self, tensor: Tensor) -> dist.Work:
        """Begin to send."""
        work = dist.isend(tensor, self.target, self.group, self.tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor) -> dist.Work:
        """Begin to receive."""
        work = dist.irecv(tensor, self.source, self.group, self.tag)
        assert work is not None
        return work


class Outgoing:
    """The sending end of a route."""

    def __init__(self, route: Route, on_loss: Callable[[BaseException], None]) -> None:
        self.route = route
        self._on_loss = on_loss
        self._header = b""
        self._awaited = 0  # tensors for which the receiver waits together with the next slot
        self._stopped = False
        self._stream = None if route.device.type == "cpu" else torch.Stream(route.device)
        self._lock = threading.Lock()  # one message after the other, and none behind the last
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = _started(_run_jobs, self._jobs, f"gpipe-send-{route.source}-to-{route.target}")

    def send(self, micro_batch: int, message: Message) -> None:
        """Begin to send a message; what it holds is kept until it has gone.

        Raises:
            Aborted: The route was stopped. ConnectionLost: The other rank is gone.
        """
        with self._lock:
            if self._stopped:
                raise Aborted
            tensors = self._laid_out(micro_batch, *pack(message, self.route.device))
            if self._stream is None:
                works = self._posted(tensors)
                self._jobs.put(lambda: self._wait(works, tensors))
            else:
                ready = torch.accelerator.current_stream(self.route.device).record_event()
                self._jobs.put(lambda: self._stage(ready, tensors))

    def stop(self) -> None:
        """Tell the receiver that nothing more will come, behind what has been sent."""
        with self._lock:
            self._stopped = True
            tensors = [_slot([_STOP, 0, 0, 0, 0]), *self._crumbs()]

        def send() -> None:
            with suppress(RuntimeError):
                self._wait(self._posted(tensors), tensors)

        self._jobs.put(send)

    def after(self, call: Callable[[], None]) -> None:
        """Call when all that was sent so far has gone."""
        self._jobs.put(call)

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)

    def _laid_out(self, micro_batch: int, header: bytes, buffers: list[Tensor]) -> list[Tensor]:
        """All that is sent for a message, in order."""
        text = b"" if header == self._header else header
        inside = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if 0 < len(text) <= _ROOM else []
        behind = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if len(text) > _ROOM else []
        if self._stream is None and len(text) + sum(b.numel() for b in buffers) <= _ROOM:
            place, tensors = _Place.SLOT, self._crumbs()
            inside += buffers
            self._awaited = 0
        else:
            place = _Place.BEHIND if text or self._awaited != len(buffers) else _Place.AWAITED
            crumbs = self._crumbs() if place == _Place.BEHIND else []
            tensors = [*crumbs, *behind, *buffers]
            self._awaited = len(buffers)
        self._header = header
        return [_slot([micro_batch, len(text), zlib.crc32(header), len(buffers), place], inside), *tensors]

    def _crumbs(self) -> list[Tensor]:
        """Something for each of the receives that wait for tensors as in the last message."""
        return [torch.zeros(1, dtype=torch.uint8, device="cpu")] * self._awaited

    def _posted(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        try:
            return [self.route.send(t) for t in tensors]
        except RuntimeError as error:
            raise ConnectionLost(f"rank {self.route.target} cannot be reached: {error}") from error

    def _stage(self, ready: torch.Event, tensors: Sequence[Tensor]) -> None:
        """Copy what is on the accelerator to pinned memory and send it from there."""
        assert self._stream is not None
        hosts = []
        with self._stream:
            self._stream.wait_event(ready)
            for t in tensors:
                if t.device.type != "cpu":
                    t.record_stream(self._stream)
                    t = torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                hosts.append(t)
        self._stream.synchronize()
        try:
            self._wait(self._posted(hosts), hosts)
        except ConnectionLost as error:
            self._on_loss(error)

    def _wait(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        """Hold ``tensors`` until they have gone."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._on_loss(ConnectionLost(f"rank {self.route.target} cannot be reached: {error}"))


@dataclass
class _Arriving:
    """A message, or None, on its way into memory, and what carries it there."""

    arrival: Arrival | None
    works: Sequence[dist.Work]

    def wait(self) -> None:
        """Return when all of it is there."""
        for work in self.works:
            work.wait()


class Incoming:
    """The receiving end of a route."""

    def __init__(self, route: Route, on_loss: Callable[[BaseException], None]) -> None:
        self.route = route
        self._on_loss = on_loss
        self._header = b""
        self._alike = False  # whether the next message is awaited with the tensors of the last
        self._stopped = False
        self._stream = None if route.device.type == "cpu" else torch.Stream(route.device)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = _started(_run_jobs, self._jobs, f"gpipe-receive-{route.target}-from-{route.source}")

    def expect(self, count: int, channel: Channel) -> None:
        """Receive so many messages, in the background, and put them into ``channel``."""
        if self._stream is not None:
            compute = torch.accelerator.current_stream(self.route.device)
        self._jobs.put(lambda: self._receive(count, channel, None if self._stream is None else compute))

    def drain(self) -> None:
        """Receive, and forget, all up to the sender's ``stop``: nobody then waits for this rank."""
        self._jobs.put(lambda: self._receive(1 << 62, None, None))

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)

    def _receive(self, count: int, channel: Channel | None, compute: torch.Stream | None) -> None:
        try:
            ahead = None
            for left in reversed(range(count)):
                if self._stopped:
                    return
                slot, work, awaited = ahead or self._posted()
                work.wait()
                micro_batch, *numbers = slot[:_NUMBERS].view(torch.int64).tolist()
                if micro_batch == _STOP:
                    self._stopped = True
                    awaited.wait()
                    return
                arriving = self._arriving(slot[_NUMBERS:], awaited, *numbers)
                ahead = self._posted() if left else None
                arriving.wait()
                message = self._opened(arriving.arrival, compute)
                if channel is not None:
                    channel.put(micro_batch, message)
        except RuntimeError as error:
            self._fail(ConnectionLost(f"rank {self.route.source} cannot be reached: {error}"))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stopped = True
        self._on_loss(error)

    def _posted(self) -> tuple[Tensor, dist.Work, _Arriving]:
        """A slot for the next message, what receives it, and what is awaited together with it."""
        slot = torch.empty(_SLOT, dtype=torch.uint8, device="cpu")
        work = self.route.receive(slot)
        arrival = Arrival(self._header, self.route.device) if self._alike else None
        return slot, work, self._receiving(arrival)

    def _receiving(self, arrival: Arrival | None) -> _Arriving:
        return _Arriving(arrival, [self.route.receive(buffer) for buffer in arrival.buffers] if arrival else [])

    def _arriving(
        self, inside: Tensor, awaited: _Arriving, size: int, check: int, number: int, place: int
    ) -> _Arriving:
        """A message whose slot has come.

        Args:
            inside: What was in the slot behind the numbers.
            awaited: What was awaited together with the slot.
            size: Bytes of the message's header, 0 if that is the last one's.
            check: The header's checksum.
            number: Of tensors.
            place: Where they are.
        """
        if place != _Place.AWAITED:
            awaited.wait()
        if size:
            text = inside[:size]
            if size > _ROOM:
                text = torch.empty(size, dtype=torch.uint8, device="cpu")
                self.route.receive(text).wait()
            self._header = text.numpy().tobytes()
        self._alike = place != _Place.SLOT
        arrival = awaited.arrival if place == _Place.AWAITED else Arrival(self._header, self.route.device)
        if arrival is None or zlib.crc32(self._header) != check or len(arrival.buffers) != number:
            raise ValueError(
                f"rank {self.route.source} announced a message of {number} tensors that does not match its description"
            )
        if place == _Place.BEHIND:
            return self._receiving(arrival)
        if place == _Place.SLOT:
            for buffer in arrival.buffers:
                buffer.copy_(inside[size : size + len(buffer)])
                size += len(buffer)
        return _Arriving(arrival, awaited.works)

    def _opened(self, arrival: Arrival | None, compute: torch.Stream | None) -> Message:
        assert arrival is not None
        if self._stream is None or compute is None:
            return arrival.message()
        with self._stream:
            message = arrival.message()
        self._stream.synchronize()
        for leaf in message.leaves if isinstance(message, Boundary) else message:
            if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                leaf.record_stream(compute)
        return message


def _slot(numbers: Sequence[int], inside: Sequence[Tensor] = ()) -> Tensor:
    """A slot that begins with these numbers; behind them bytes."""
    slot = torch.empty(_SLOT, dtype=torch.uint8, device="cpu")
    slot[:_NUMBERS].view(torch.int64).copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    end = _NUMBERS
    for part in inside:
        slot[end : end + len(part)] = part
        end += len(part)
    return slot


def _started(target: Callable[..., None], jobs: Any, name: str) -> threading.Thread:
    thread = threading.Thread(target=target, args=(jobs,), name=name, daemon=True)
    thread.start()
    return thread


def _run_jobs(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
