"""The receiving end of a route. A thread receives over gloo while the rank computes.

What comes to an accelerator is handed over before it is there: the stream that uses it waits, not the host.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.context import current
from gpipe.ranks.direct import UnderWay
from gpipe.ranks.packing import Arrival, Message
from gpipe.ranks.routes import Jobs, Route, jobs_thread, reaching
from gpipe.ranks.slot import ROOM, STOP, Place, Slot, room
from gpipe.transport import Aborted, Channel


@dataclass
class _Awaited:
    """A message, or None, on its way into memory, and what carries it there.

    Attributes:
        arrival: The message.
        source: The rank that sends it.
        works: Over gloo.
        straight: To the device, once that was issued.
    """

    arrival: Arrival | None
    source: int
    works: Sequence[dist.Work] = ()
    straight: list[dist.Work] = field(default_factory=list)

    def wait(self) -> None:
        """Return when all is there that comes over gloo. To be called once: it would wait for another message."""
        with reaching(f"rank {self.source}"):
            for work in self.works:
                work.wait()

    def wait_on_device(self) -> None:
        """Let the device's current stream wait for what comes straight to the device."""
        with reaching(f"rank {self.source}"):
            for work in self.straight:
                work.wait()


@dataclass
class Landing:
    """A message on its way to an accelerator.

    Attributes:
        arrival: The message.
        moved: Happens when what came to the CPU is on the device; None if that was nothing.
        awaited: What carries to the device what comes there.
        under_way: Keeps what is still received.
    """

    arrival: Arrival
    moved: torch.Event | None
    awaited: _Awaited
    under_way: UnderWay

    def landed(self) -> Message:
        """The message, for use on its device's current stream, which waits for it; the host does not."""
        device = self.arrival.device
        stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)
        if stream is not None and self.moved is not None:
            stream.wait_event(self.moved)
        if self.awaited.arrival is self.arrival:
            self.awaited.wait_on_device()
            self.under_way.release(self.awaited.straight)
        message = self.arrival.message()
        if stream is not None:
            self.arrival.record(stream)
        return message


class Incoming:
    """The receiving end of a route.

    Args:
        route: The route.
        on_loss: Told what ends it.
    """

    def __init__(self, route: Route, on_loss: Callable[[BaseException], None]) -> None:
        self.route = route
        self._on_loss = on_loss
        self._header = b""
        self._alike = False  # whether the next message is awaited with the tensors of the last
        self._stopped = False
        self._stream = route.stream()
        self._under_way = UnderWay()
        self._awaited: SimpleQueue[_Awaited | None] = SimpleQueue()  # of every message to come, one ahead
        self._jobs: Jobs = SimpleQueue()
        self.thread = jobs_thread(self._jobs, f"gpipe-receive-{route.target}-from-{route.source}", route.device)

    def expect(self, count: int, channel: Channel) -> None:
        """Receive so many messages, in the background, and put them into ``channel``."""
        self._jobs.put(lambda: self._receive(count, channel))

    def ready(self) -> bool:
        """Whether ``issue`` would not wait."""
        return not self._awaited.empty()

    def issue(self) -> None:
        """Begin to receive what of the next message is awaited straight to the device.

        To be called for every message, in the order in which the other rank sends all of its own: waits until it is
        known what is awaited.

        Raises:
            Aborted: The route was stopped. ConnectionLost: The other rank is gone.
            torch.OutOfMemoryError: The device has no room.
        """
        awaited = self._awaited.get()
        self._under_way.count()
        if awaited is None:
            raise Aborted
        if awaited.arrival is None or not awaited.arrival.has_direct:
            return
        assert self.route.direct is not None
        with nullcontext() if self._stream is None else current([self._stream]):
            buffers = awaited.arrival.direct_buffers()
            with reaching(f"rank {self.route.source}"):
                awaited.straight += self.route.direct.receive(buffers)
        self._under_way.keep(awaited.straight, buffers)

    def busy(self) -> bool:
        """Whether something is still received on the device."""
        return self._under_way.count() > 0

    def drain(self) -> None:
        """Receive, and forget, all up to the sender's ``stop``: nobody then waits for this rank."""
        self._awaited.put(None)
        self._jobs.put(lambda: self._receive(1 << 62, None))

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)

    def _receive(self, count: int, channel: Channel | None) -> None:
        try:
            ahead = None
            for left in reversed(range(count)):
                if self._stopped:
                    return
                memory, work, awaited = ahead or self._posted()
                with reaching(f"rank {self.route.source}"):
                    work.wait()
                slot, inside = Slot.read(memory)
                if slot.micro_batch == STOP:
                    self._stopped = True
                    awaited.wait()
                    return
                arriving = self._arriving(slot, inside, awaited)
                ahead = self._posted() if left else None
                arriving.wait()
                if channel is not None:
                    channel.put(slot.micro_batch, self._opened(arriving, awaited))
        except Exception as error:
            error.add_note(f"gpipe: raised where a message of rank {self.route.source} was received")
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._stopped = True
        self._on_loss(error)

    def _posted(self) -> tuple[Tensor, dist.Work, _Awaited]:
        """Memory for the next slot, what receives it, and what is awaited together with it."""
        memory = room()
        work = self.route.receive(memory)
        awaited = _Awaited(None, self.route.source)
        if self._alike:
            awaited = self._receiving(Arrival(self._header, self.route.device, self.route.direct is not None))
        if self.route.direct is not None:
            self._awaited.put(awaited)
        return memory, work, awaited

    def _receiving(self, arrival: Arrival) -> _Awaited:
        return _Awaited(arrival, self.route.source, [self.route.receive(buffer) for buffer in arrival.buffers])

    def _arriving(self, slot: Slot, inside: Tensor, awaited: _Awaited) -> _Awaited:
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
                with reaching(f"rank {self.route.source}"):
                    self.route.receive(text).wait()
            self._header = text.numpy().tobytes()
        self._alike = slot.place != Place.SLOT
        arrival = awaited.arrival if slot.place == Place.AWAITED else Arrival(self._header, self.route.device)
        if arrival is None or zlib.crc32(self._header) != slot.check or arrival.number != slot.number:
            raise ValueError(
                f"rank {self.route.source} announced a message of {slot.number} tensors that does not match its "
                "description"
            )
        if slot.place == Place.AWAITED:
            return awaited
        if slot.place == Place.BEHIND:
            return self._receiving(arrival)
        begin = slot.size
        for buffer in arrival.buffers:
            buffer.copy_(inside[begin : begin + len(buffer)])
            begin += len(buffer)
        return _Awaited(arrival, self.route.source)

    def _opened(self, arriving: _Awaited, awaited: _Awaited) -> Message | Landing:
        """A message of which all has come but what comes straight to the device."""
        arrival = arriving.arrival
        assert arrival is not None
        if self._stream is None and self.route.direct is None:
            arrival.move()
            return arrival.message()
        with nullcontext() if self._stream is None else current([self._stream]):
            arrival.move()
            moved = None if self._stream is None or not arrival.buffers else self._stream.record_event()
        return Landing(arrival, moved, awaited, self._under_way)
