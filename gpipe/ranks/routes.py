"""The two ends of a route between ranks, over gloo point-to-point messages.

A message is a slot (``slot.py``) and tensors of bytes. Those on an accelerator pass through pinned memory, or straight
to the other rank's accelerator (``direct.py``) once the slot has come.

A thread for each incoming route receives while the rank computes; one for each outgoing route keeps what is sent until
it has gone.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.boundary import Boundary
from gpipe.ranks.direct import Direct
from gpipe.ranks.packing import Arrival, Message, pack
from gpipe.ranks.slot import ROOM, STOP, Place, Slot, room
from gpipe.transport import Aborted, Channel


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
        direct: Carries tensors from device to device, if that can be.
    """

    source: int
    target: int
    tag: int
    group: dist.ProcessGroup
    device: torch.device
    direct: Direct | None = None

    def divided(self, buffers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those that ``group`` carries, and those that ``direct`` does."""
        straight = [self.direct is not None and b.device == self.device for b in buffers]
        parted = list(zip(buffers, straight, strict=True))
        return [b for b, direct in parted if not direct], [b for b, direct in parted if direct]

    def stream(self) -> torch.Stream | None:
        """A stream for copies beside the computation, on an accelerator."""
        return None if self.device.type == "cpu" else torch.Stream(self.device)

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
        self._stream = route.stream()
        self._lock = threading.Lock()  # one message after the other, and none behind the last
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = _started(_run_jobs, self._jobs, f"gpipe-send-{route.source}-to-{route.target}")

    def send(self, micro_batch: int, message: Message) -> None:
        """Begin to send a message; what it holds is kept until it has gone.

        Raises:
            Aborted: The route was stopped. ConnectionLost: The other rank is gone.
        """
        with self._lock:
            if self._stopped:
                raise Aborted
            header, buffers = pack(message, self.route.device)
            near, far = self.route.divided(buffers)
            tensors = self._laid_out(micro_batch, header, len(buffers), near)
            if self._stream is None and self.route.direct is None:
                works = self._posted(tensors)
                self._jobs.put(lambda: self._wait(works, tensors))
            else:
                ready = None
                if self._stream is not None:
                    ready = torch.accelerator.current_stream(self.route.device).record_event()
                self._jobs.put(lambda: self._stage(ready, tensors, far))

    def stop(self) -> None:
        """Tell the receiver that nothing more will come, behind what has been sent."""
        with self._lock:
            self._stopped = True
            tensors = [Slot(STOP).packed(), *self._crumbs()]

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

    def _laid_out(self, micro_batch: int, header: bytes, number: int, buffers: list[Tensor]) -> list[Tensor]:
        """All that ``group`` carries of a message of ``number`` tensors, in order."""
        text = b"" if header == self._header else header
        inside = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if 0 < len(text) <= ROOM else []
        behind = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if len(text) > ROOM else []
        here = all(b.device.type == "cpu" for b in buffers)
        if here and len(text) + sum(b.numel() for b in buffers) <= ROOM:
            place, tensors = Place.SLOT, self._crumbs()
            inside += buffers
            self._awaited = 0
        else:
            place = Place.BEHIND if text or self._awaited != len(buffers) else Place.AWAITED
            crumbs = self._crumbs() if place == Place.BEHIND else []
            tensors = [*crumbs, *behind, *buffers]
            self._awaited = len(buffers)
        self._header = header
        return [Slot(micro_batch, len(text), zlib.crc32(header), number, place).packed(inside), *tensors]

    def _crumbs(self) -> list[Tensor]:
        """Something for each of the receives that wait for tensors as in the last message."""
        return [torch.zeros(1, dtype=torch.uint8, device="cpu")] * self._awaited

    def _posted(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        try:
            return [self.route.send(t) for t in tensors]
        except RuntimeError as error:
            raise self._loss(error) from error

    def _stage(self, ready: torch.Event | None, tensors: Sequence[Tensor], far: Sequence[Tensor]) -> None:
        """Send what is computed: ``far`` directly, the rest from pinned memory."""
        with self._stream or nullcontext():
            if self._stream is not None and ready is not None:
                self._stream.wait_event(ready)
            hosts = [t if t.device.type == "cpu" else _pinned(t) for t in tensors]
            _synchronise(self._stream)
            try:
                works = self._posted(hosts)
                if self.route.direct is not None:
                    self.route.direct.send(far)
                    _synchronise(self._stream)
                self._wait(works, hosts)
            except RuntimeError as error:
                self._on_loss(self._loss(error))

    def _wait(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        """Hold ``tensors`` until they have gone."""
        try:
            for work in works:
                work.wait()
        except RuntimeError as error:
            self._on_loss(self._loss(error))

    def _loss(self, error: RuntimeError) -> ConnectionLost:
        if isinstance(error, ConnectionLost):
            return error
        return ConnectionLost(f"rank {self.route.target} cannot be reached: {error}")


@dataclass
class _Arriving:
    """A message, or None, on its way into memory, and what carries it there."""

    arrival: Arrival | None
    works: Sequence[dist.Work]

    def wait(self) -> None:
        """Return when all of it is there. To be called once: gloo would wait for another message."""
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
        self._stream = route.stream()
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = _started(_run_jobs, self._jobs, f"gpipe-receive-{route.target}-from-{route.source}")

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
                memory, work, awaited = ahead or self._posted()
                work.wait()
                slot, inside = Slot.read(memory)
                if slot.micro_batch == STOP:
                    self._stopped = True
                    awaited.wait()
                    return
                arriving = self._arriving(slot, inside, awaited)
                ahead = self._posted() if left else None
                arriving.wait()
                message = self._opened(arriving.arrival, compute)
                if channel is not None:
                    channel.put(slot.micro_batch, message)
        except RuntimeError as error:
            self._fail(ConnectionLost(f"rank {self.route.source} cannot be reached: {error}"))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stopped = True
        self._on_loss(error)

    def _posted(self) -> tuple[Tensor, dist.Work, _Arriving]:
        """Memory for the next slot, what receives it, and what is awaited together with it."""
        memory = room()
        work = self.route.receive(memory)
        return memory, work, self._receiving(self._room()) if self._alike else _Arriving(None, [])

    def _room(self) -> Arrival:
        """Memory for a message laid out as the last one."""
        with self._stream or nullcontext():
            return Arrival(self._header, self.route.device, self.route.direct is not None)

    def _receiving(self, arrival: Arrival) -> _Arriving:
        near, _ = self.route.divided(arrival.buffers)
        return _Arriving(arrival, [self.route.receive(buffer) for buffer in near])

    def _arriving(self, slot: Slot, inside: Tensor, awaited: _Arriving) -> _Arriving:
        """A message whose slot has come.

        Args:
            slot: Its numbers.
            inside: The bytes behind them.
            awaited: What was awaited together with the slot.
        """
        if slot.place != Place.AWAITED:
            awaited.wait()
        if slot.size:
            text = inside[: slot.size]
            if slot.size > ROOM:
                text = torch.empty(slot.size, dtype=torch.uint8, device="cpu")
                self.route.receive(text).wait()
            self._header = text.numpy().tobytes()
        self._alike = slot.place != Place.SLOT
        arrival = awaited.arrival if slot.place == Place.AWAITED else self._room()
        if arrival is None or zlib.crc32(self._header) != slot.check or len(arrival.buffers) != slot.number:
            raise ValueError(
                f"rank {self.route.source} announced a message of {slot.number} tensors that does not match its "
                "description"
            )
        if slot.place == Place.AWAITED:
            return awaited
        if slot.place == Place.BEHIND:
            return self._receiving(arrival)
        near, _ = self.route.divided(arrival.buffers)
        begin = slot.size
        for buffer in near:
            buffer.copy_(inside[begin : begin + len(buffer)])
            begin += len(buffer)
        return _Arriving(arrival, [])

    def _opened(self, arrival: Arrival | None, compute: torch.Stream | None) -> Message:
        """A message of which all has come but what comes directly."""
        assert arrival is not None
        with self._stream or nullcontext():
            if self.route.direct is not None:
                self.route.direct.receive(self.route.divided(arrival.buffers)[1])
            message = arrival.message()
            _synchronise(self._stream)
        if compute is not None:
            for leaf in message.leaves if isinstance(message, Boundary) else message:
                if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                    leaf.record_stream(compute)
        return message


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, once the current stream has made it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _synchronise(stream: torch.Stream | None) -> None:
    """Wait until an accelerator's stream has done all it was given."""
    if stream is not None:
        stream.synchronize()


def _started(target: Callable[..., None], jobs: Any, name: str) -> threading.Thread:
    thread = threading.Thread(target=target, args=(jobs,), name=name, daemon=True)
    thread.start()
    return thread


def _run_jobs(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
