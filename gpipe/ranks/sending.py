"""The sending end of a route. A thread keeps what is sent over gloo until it has gone."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.context import current
from gpipe.ranks.direct import UnderWay
from gpipe.ranks.packing import Message, pack
from gpipe.ranks.routes import ConnectionLost, Jobs, Route, jobs_thread, reaching
from gpipe.ranks.slot import ROOM, STOP, Place, Slot
from gpipe.transport import Aborted

_MOST = 4  # messages under way between accelerators: how far the host may run ahead, and what that takes in memory
_PAUSE = 1e-4  # seconds between two looks whether one has gone


class Outgoing:
    """The sending end of a route.

    Args:
        route: The route.
        on_loss: Told what ends it.
    """

    def __init__(self, route: Route, on_loss: Callable[[BaseException], None]) -> None:
        self.route = route
        self._on_loss = on_loss
        self._header = b""
        self._awaited: list[int] | None = None  # bytes of the tensors that the receiver awaits with the next slot
        self._straight: list[int] = []  # the same of those it awaits on its device
        self._stopped = False
        self._stream = route.stream()
        self._under_way = UnderWay()
        self._lock = threading.Lock()  # one message after the other, and none behind the last
        self._staged = [0, 0]  # messages that the thread was to begin to send, and that it has begun to
        self._jobs: Jobs = SimpleQueue()
        self.thread = jobs_thread(self._jobs, f"gpipe-send-{route.source}-to-{route.target}", route.device)

    def send(self, micro_batch: int, message: Message) -> None:
        """Begin to send a message; what it holds is kept until it has gone.

        Where accelerators send to each other, the host waits while too many messages are under way.

        Raises:
            Aborted: The route was stopped. ConnectionLost: The other rank is gone.
        """
        if self.route.direct is not None:
            self._make_room()
        with self._lock:
            if self._stopped:
                raise Aborted
            header, buffers = pack(message, self.route.device)
            slot, tensors, straight = self._laid_out(micro_batch, header, buffers)
            self._send_straight(straight)
            if self._stream is None:
                self._post([slot, *tensors])
            else:
                self._pass_on(slot, tensors)

    def stop(self) -> None:
        """Tell the receiver that nothing more will come, behind what has been sent."""
        with self._lock:
            self._stopped = True
            tensors = [Slot(STOP).packed(), *self._crumbs()]

        def send() -> None:
            with suppress(RuntimeError):
                self._wait(self._begun(tensors), tensors)

        self._jobs.put(send)

    def after(self, call: Callable[[], None]) -> None:
        """Call when all that was sent so far over gloo has gone."""
        self._under_way.count()
        self._jobs.put(call)

    def busy(self) -> bool:
        """Whether something is still under way between accelerators."""
        return self._under_way.count() > 0

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)

    def _make_room(self) -> None:
        while self._under_way.count() >= _MOST:
            if self._stopped:
                raise Aborted
            time.sleep(_PAUSE)

    def _laid_out(
        self, micro_batch: int, header: bytes, buffers: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """A message's slot, what follows it over gloo, and what goes straight to the device."""
        text = b"" if header == self._header else header
        inside = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if 0 < len(text) <= ROOM else []
        behind = [torch.frombuffer(bytearray(text), dtype=torch.uint8)] if len(text) > ROOM else []
        here = all(b.device.type == "cpu" for b in buffers)
        near, far = self._divided(buffers)
        straight = far
        if here and len(text) + sum(b.numel() for b in buffers) <= ROOM:
            place, tensors, straight = Place.SLOT, self._crumbs(), self._straight_crumbs()
            inside += buffers
            self._awaited, self._straight = None, []
        elif text or self._awaited is None:
            place, tensors, straight = Place.BEHIND, [*self._crumbs(), *behind, *buffers], self._straight_crumbs()
            self._awaited, self._straight = [b.numel() for b in near], [b.numel() for b in far]
        else:
            place, tensors = Place.AWAITED, near
        self._header = header
        slot = Slot(micro_batch, len(text), zlib.crc32(header), len(buffers), place)
        return slot.packed(inside), tensors, straight

    def _divided(self, buffers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Those that go over gloo, and those that go straight, where both ends know their layout."""
        if self.route.direct is None:
            return buffers, []
        device = self.route.device
        return [b for b in buffers if b.device != device], [b for b in buffers if b.device == device]

    def _crumbs(self) -> list[Tensor]:
        """Something for each of the receives that wait for tensors as in the last message."""
        return [torch.zeros(1, dtype=torch.uint8, device="cpu")] * len(self._awaited or ())

    def _straight_crumbs(self) -> list[Tensor]:
        """The same for those on the receiver's device, which wait for as many bytes."""
        return [torch.empty(size, dtype=torch.uint8, device=self.route.device) for size in self._straight]

    def _send_straight(self, tensors: list[Tensor]) -> None:
        if not tensors:
            return
        assert self.route.direct is not None
        with reaching(f"rank {self.route.target}"):
            self._under_way.keep(self.route.direct.send(tensors), tensors)

    def _post(self, tensors: list[Tensor]) -> None:
        """Begin to send what is on the CPU."""
        works = self._begun(tensors)
        self._jobs.put(lambda: self._wait(works, tensors))

    def _pass_on(self, slot: Tensor, tensors: list[Tensor]) -> None:
        """Begin to send what belongs to a slot, some of which an accelerator may still compute."""
        if not tensors and self._staged[0] == self._staged[1]:
            self._post([slot])
            return
        ready = torch.accelerator.current_stream(self.route.device).record_event()
        self._staged[0] += 1
        self._jobs.put(lambda: self._stage(ready, [slot, *tensors]))

    def _stage(self, ready: torch.Event, tensors: list[Tensor]) -> None:
        """Send what is computed, from pinned memory."""
        assert self._stream is not None
        try:
            with current([self._stream]):
                self._stream.wait_event(ready)
                hosts = [t if t.device.type == "cpu" else _pinned(t) for t in tensors]
                self._stream.synchronize()
            works = self._begun(hosts)
        except Exception as error:
            self._on_loss(error)
        else:
            self._staged[1] += 1
            self._wait(works, hosts)

    def _begun(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        return [self.route.send(t) for t in tensors]

    def _wait(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        """Hold ``tensors`` until they have gone."""
        try:
            with reaching(f"rank {self.route.target}"):
                for work in works:
                    work.wait()
        except ConnectionLost as error:
            self._on_loss(error)


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, once the current stream has made it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
