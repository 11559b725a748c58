"""A communicator of simulated accelerators: a stream of its own, on which its operations run one after the other.

The simulator computes at once, so bytes travel when they are sent. They are put into the receiver's buffer, which has
poison until then, when the host waits for the operation: there, unlike with NCCL, the host waits for the other rank to
have issued its part.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.testing.accelerators import issuing
from gpipe.testing.accelerators.issuing import Issuers, Notice, Part
from gpipe.testing.accelerators.mail import post_office
from gpipe.testing.accelerators.moments import free_at, hold


@dataclass(frozen=True)
class Members:
    """Who belongs to a group.

    Attributes:
        name: The same on all ranks, and no other group's.
        rank: This process.
        addresses: Of every rank's post office.
        timeout: Seconds after which waiting for another rank ends.
    """

    name: str
    rank: int
    addresses: Sequence[str]
    timeout: float


class Device:
    """What all communicators of a device have in common: the threads that issue, and what has not run yet."""

    _all: ClassVar[dict[int, Device]] = {}
    _lock = threading.RLock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._issuers = Issuers(str(device))
        self._pending: list[Operation] = []

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """The one of a device."""
        with cls._lock:
            if device.index not in cls._all:
                cls._all[device.index] = cls(device)
            return cls._all[device.index]

    def enter(self, operation: Operation, what: str) -> None:
        """Check the thread that issues an operation, and let go of what has run."""
        with self._lock:
            self._pending = [other for other in self._pending if not other.is_let_go()]
            self._issuers.enter(what, [other.thread for other in self._pending])
            self._pending.append(operation)


@dataclass
class Plan:
    """What an operation does.

    Attributes:
        kind: Its name.
        parts: What it is to peers, by their rank; in order.
        needs: Peers whose bytes it needs.
        tensors: What it reads and writes: alive until it has run.
        run: Reads and writes them on the current stream.
        deliver: Puts the parts of those peers, in their order of issue, where they belong.
        host_waits: Whether the host waits until it has run.
    """

    kind: str
    parts: dict[int, list[Part]]
    needs: frozenset[int]
    tensors: list[Tensor]
    run: Callable[[], None]
    deliver: Callable[[dict[int, list[Part]]], None] = lambda parts: None
    host_waits: bool = False

    def forget(self) -> None:
        """Let go of tensors and bytes."""
        self.parts, self.tensors = {}, []
        self.run, self.deliver = (lambda: None), (lambda parts: None)


class Operation(dist.Work):
    """Operations issued together, as torch.distributed's ``Work``."""

    def __init__(self, communicator: Communicator, plan: Plan, stream: torch.Stream) -> None:
        super().__init__()
        self.thread = threading.current_thread()
        self.stream = stream
        self.event = torch.Event(stream.device, enable_timing=True)
        self.plan = plan
        self.numbers: dict[int, int] = {}
        self.settled = False
        self.ready = 0.0
        self._communicator = communicator
        self._let_go = False

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Let the current stream wait until it has run; the host waits for the other ranks to have issued theirs.

        Raises:
            torch.distributed.DistBackendError: After ``abort``, after the group's timeout, or if what another rank
                issued does not match.
        """
        self._communicator.settle(self, timeout.total_seconds() or self._communicator.members.timeout)
        torch.accelerator.current_stream(self.stream.device).wait_event(self.event)
        if self.plan.host_waits:
            self.event.synchronize()
        self._release()
        return True

    def synchronize(self) -> None:
        """As ``wait``."""
        self.wait()

    def block_current_stream(self) -> None:
        """As ``wait``."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it has run, in simulated time; where it has, the host knows."""
        return self._communicator.settle(self, 0) and self.event.query()

    def is_success(self) -> bool:
        """Whether it has run."""
        return self.is_completed()

    def is_let_go(self) -> bool:
        """Whether nothing need keep its tensors any more: it was waited for, or has run."""
        if not self._let_go:
            try:
                ended = self._communicator.settle(self, 0) and self.ready <= time.monotonic()
            except dist.DistBackendError:  # closed: it never runs
                ended = True
            if ended:
                for tensor in self.plan.tensors:  # that it has run the detector cannot know: the host did not ask
                    tensor.record_stream(self.stream)
                self._release()
        return self._let_go

    def _release(self) -> None:
        if not self._let_go:
            self._let_go = True
            self.plan.forget()
            self._communicator.reuse(self.stream)


class Communicator:
    """A communicator of a group: one for its collectives, and one for each pair of ranks that exchange tensors.

    Args:
        members: The group.
        key: Which of the group's.
        device: Where its tensors are.
    """

    def __init__(self, members: Members, key: str, device: torch.device) -> None:
        self.members = members
        self.name = f"{members.name}{key and '/'}{key}"
        self._closed = ""
        self._device = Device.of(device)
        self._changed = threading.Condition()
        self._settling = threading.Lock()
        self._issued: dict[tuple[int, int], Notice] = {}
        self._heard: dict[tuple[int, int], Notice] = {}
        self._needed: set[tuple[int, int]] = set()
        self._count: dict[int, int] = {}
        self._unsettled: list[Operation] = []
        self._idle: list[torch.Stream] = []
        self._last: torch.Event | None = None
        self._arrived = 0.0
        post_office().open(self.name, self._hear)

    # --- issuing

    def issue(self, plan: Plan) -> Operation:
        """Start what the current stream has come to, and tell the peers.

        Raises:
            torch.distributed.DistBackendError: If the communicator is closed.
        """
        with self._changed:
            if self._closed:
                raise dist.DistBackendError(self._closed)
            stream = self._idle.pop() if self._idle else torch.Stream(self._device.device)
        operation = Operation(self, plan, stream)
        self._device.enter(operation, f"{plan.kind} on {self.name}")
        with self._changed:
            stream.wait_stream(torch.accelerator.current_stream(stream.device))
            if self._last is not None:
                stream.wait_event(self._last)
            hold(stream, self._arrived)
            with torch.no_grad(), stream:
                plan.run()
            ready = free_at(stream) + self._seconds(plan)
            hold(stream, ready)
            operation.ready = ready
            operation.event.record(stream)
            self._last = operation.event
            if plan.needs:
                self._unsettled.append(operation)
            operation.settled = not plan.needs
            for peer, parts in plan.parts.items():
                operation.numbers[peer] = self._tell(peer, tuple(parts), ready, peer in plan.needs)
        return operation

    def reuse(self, stream: torch.Stream) -> None:
        """Take a stream back."""
        with self._changed:
            self._idle.append(stream)

    def _seconds(self, plan: Plan) -> float:
        sizes = [part.size for parts in plan.parts.values() for part in parts if part.payload is not None]
        return issuing.seconds(max(sizes)) if sizes else 0.0

    def _tell(self, peer: int, parts: tuple[Part, ...], ready: float, needed: bool) -> int:
        number = self._count.get(peer, 0)
        self._count[peer] = number + 1
        address = self.members.addresses[peer]
        place = issuing.places.take(address, f"{' and '.join(map(str, parts))} on {self.name}")
        notice = Notice(self.members.rank, number, place, parts, ready, self.name)
        post_office().send(address, self.name, notice)
        self._issued[peer, number] = notice
        if needed:
            self._needed.add((peer, number))
        self._compare(peer, number)
        return number

    # --- hearing from peers

    def _hear(self, notice: Notice) -> None:
        with self._changed:
            self._heard[notice.source, notice.number] = notice
            self._compare(notice.source, notice.number)
            self._changed.notify_all()

    def _compare(self, peer: int, number: int) -> None:
        key = peer, number
        if key not in self._issued or key not in self._heard:
            return
        ours, theirs = self._issued.pop(key), self._heard[key]
        if key not in self._needed:
            del self._heard[key]
        wrong = issuing.disagreement(ours, theirs)
        if wrong:
            issuing.report(wrong)
            self._closed = self._closed or wrong
        else:
            issuing.places.compare(self.members.addresses[peer], ours, theirs)

    def close(self, why: str) -> None:
        """End all waiting, and refuse what is issued from now on, for this reason."""
        with self._changed:
            self._closed = self._closed or why
            self._changed.notify_all()
            issuing.places.lose(self.members.addresses[peer] for peer, _ in self._issued)
        post_office().close(self.name)

    # --- waiting

    def settle(self, operation: Operation, seconds: float) -> bool:
        """Receive what an operation needs, after what earlier ones need.

        Args:
            operation: One of this communicator's.
            seconds: How long to wait for it.

        Returns:
            False if it has not come, and ``seconds`` is 0.

        Raises:
            torch.distributed.DistBackendError: If the communicator is closed, or the seconds are over.
        """
        deadline = time.monotonic() + seconds if seconds else 0.0
        while not operation.settled:
            if not self._settling.acquire(timeout=seconds or 0.001):
                return False
            try:
                if operation.settled:
                    break
                first = self._unsettled[0]
                if not self._await(first, deadline):
                    return False
                self._receive(first)
            finally:
                self._settling.release()
        return True

    def _await(self, operation: Operation, deadline: float) -> bool:
        keys = self._keys(operation)
        with self._changed:
            while not self._closed:
                missing = [peer for peer, number in keys if (peer, number) not in self._heard]
                if not missing:
                    return True
                if not deadline:
                    return False
                if time.monotonic() >= deadline:
                    what = f"{operation.plan.kind} on {self.name}"
                    raise dist.DistBackendError(
                        f"{what} timed out: rank {missing[0]} of the group did not issue its part"
                    )
                self._changed.wait(deadline - time.monotonic())
        raise dist.DistBackendError(self._closed)

    def _keys(self, operation: Operation) -> list[tuple[int, int]]:
        return [(peer, operation.numbers[peer]) for peer in operation.plan.needs]

    def _receive(self, operation: Operation) -> None:
        keys = self._keys(operation)
        with self._changed:
            notices = {key[0]: self._heard.pop(key) for key in keys}
            self._needed.difference_update(keys)
            operation.plan.deliver({peer: list(notice.parts) for peer, notice in notices.items()})
            self._arrived = max(self._arrived, *(notice.ready for notice in notices.values()))
            hold(operation.stream, self._arrived)
            operation.ready = max(operation.ready, self._arrived)
            operation.event.record(operation.stream)
            self._unsettled.remove(operation)
            operation.settled = True


# --- bytes ------------------------------------------------------------------------------------------------------------


def contents(tensor: Tensor) -> bytes:
    """The bytes of a tensor of a simulated accelerator, past all its checks."""
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.nbytes else b""


def fill(tensor: Tensor, payload: bytes) -> None:
    """Replace them."""
    if payload:
        ctypes.memmove(tensor.data_ptr(), payload, len(payload))
