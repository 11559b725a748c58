"""The two ends of a route between ranks, over gloo point-to-point messages.

A message begins with a slot of fixed size, for which its receiver waits ahead: numbers, and what fits behind them of
the header, sent if it differs from the route's last, and of the bytes; else these follow. A thread for each incoming
route receives while the rank computes; one for each outgoing route keeps what is sent until it has gone.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.boundary import Boundary
from gpipe.packing import Arrival, Message, pack
from gpipe.transport import Channel

_STOP = -1  # in place of a micro-batch: nothing more will come
_NUMBERS = 5 * 8  # bytes: micro-batch, bytes of the header, its checksum, number of tensors, whether all is in the slot
_SLOT = 4096  # bytes; messages as small as this need one exchange, not two


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
        self._stream = None if route.device.type == "cpu" else torch.Stream(route.device)
        self._lock = threading.Lock()  # one message's tensors follow each other
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = _started(_run_jobs, self._jobs, f"gpipe-send-{route.source}-to-{route.target}")

    def send(self, micro_batch: int, message: Message) -> None:
        """Begin to send a message; what it holds is kept until it has gone."""
        header, buffers = pack(message, self.route.device)
        changed = header != self._header
        self._header = header
        text = [torch.frombuffer(bytearray(header), dtype=torch.uint8)] if changed else []
        rest = [*text, *buffers]
        fits = self._stream is None and sum(part.numel() for part in rest) <= _SLOT - _NUMBERS
        slot = _slot([micro_batch, len(header) if changed else 0, zlib.crc32(header), len(buffers), fits])
        if fits and rest:
            joined = torch.cat(rest)
            slot[_NUMBERS : _NUMBERS + len(joined)] = joined
        tensors = [slot] if fits else [slot, *rest]
        if self._stream is None:
            works = self._posted(tensors)
            self._jobs.put(lambda: self._wait(works, tensors))
        else:
            ready = torch.accelerator.current_stream(self.route.device).record_event()
            self._jobs.put(lambda: self._stage(ready, tensors))

    def stop(self) -> None:
        """Tell the receiver that nothing more will come, behind what has been sent."""
        slot = _slot([_STOP, 0, 0, 0, 0])

        def send() -> None:
            with suppress(RuntimeError):
                self._wait(self._posted([slot]), [slot])

        self._jobs.put(send)

    def after(self, call: Callable[[], None]) -> None:
        """Call when all that was sent so far has gone."""
        self._jobs.put(call)

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)

    def _posted(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        try:
            with self._lock:
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
                host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                if t.device.type != "cpu":
                    t.record_stream(self._stream)
                hosts.append(host)
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


class Incoming:
    """The receiving end of a route."""

    def __init__(self, route: Route, on_loss: Callable[[BaseException], None]) -> None:
        self.route = route
        self._on_loss = on_loss
        self._header = b""
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
                slot, work = ahead or self._posted()
                work.wait()
                micro_batch, size, check, number, fits = slot[:_NUMBERS].view(torch.int64).tolist()
                if micro_batch == _STOP:
                    self._stopped = True
                    return
                rest = slot[_NUMBERS:] if fits else None
                arrival, works = self._arriving(size, check, number, rest)
                ahead = self._posted() if left else None
                for work in works:
                    work.wait()
                message = self._opened(arrival, compute)
                if channel is not None:
                    channel.put(micro_batch, message)
        except RuntimeError as error:
            self._fail(ConnectionLost(f"rank {self.route.source} cannot be reached: {error}"))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stopped = True
        self._on_loss(error)

    def _posted(self) -> tuple[Tensor, dist.Work]:
        """A slot for the next message, and what receives it."""
        slot = torch.empty(_SLOT, dtype=torch.uint8, device="cpu")
        return slot, self.route.receive(slot)

    def _arriving(self, size: int, check: int, number: int, rest: Tensor | None) -> tuple[Arrival, list[dist.Work]]:
        """A message whose slot has come.

        Args:
            size: Bytes of its header, 0 if that is the last one's.
            check: The header's checksum.
            number: Of tensors.
            rest: What was in the slot behind the numbers, if that is all; None if it follows.
        """
        if size:
            text = torch.empty(size, dtype=torch.uint8, device="cpu") if rest is None else rest[:size]
            if rest is None:
                self.route.receive(text).wait()
            self._header = text.numpy().tobytes()
        arrival = Arrival(self._header, self.route.device)
        if zlib.crc32(self._header) != check or len(arrival.buffers) != number:
            raise ValueError(
                f"rank {self.route.source} announced a message of {number} tensors that does not match its description"
            )
        if rest is None:
            return arrival, [self.route.receive(buffer) for buffer in arrival.buffers]
        for buffer in arrival.buffers:
            buffer.copy_(rest[size : size + len(buffer)])
            size += len(buffer)
        return arrival, []

    def _opened(self, arrival: Arrival, compute: torch.Stream | None) -> Message:
        if self._stream is None or compute is None:
            return arrival.message()
        with self._stream:
            message = arrival.message()
        self._stream.synchronize()
        for leaf in message.leaves if isinstance(message, Boundary) else message:
            if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
                leaf.record_stream(compute)
        return message


def _slot(numbers: Sequence[int]) -> Tensor:
    """A slot that begins with these numbers."""
    slot = torch.empty(_SLOT, dtype=torch.uint8, device="cpu")
    slot[:_NUMBERS].view(torch.int64).copy_(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    return slot


def _started(target: Callable[..., None], jobs: Any, name: str) -> threading.Thread:
    thread = threading.Thread(target=target, args=(jobs,), name=name, daemon=True)
    thread.start()
    return thread


def _run_jobs(jobs: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job
