"""The order in which ranks issue operations on communicators, checked against what NCCL asks for.

NCCL's messages carry no tags: operations match by the order in which they are issued. What goes wrong there shows as a
hang, or as bytes of another message; here it is a report.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

_lock = threading.RLock()
_reports: list[str] = []
_accused: set[str] = set()
_link = (0.0, 0.0)


def set_link(bandwidth: float, latency: float) -> None:
    """Bytes a second (0: at once) and seconds of every message."""
    global _link
    _link = bandwidth, latency


def seconds(size: int) -> float:
    """What a message of so many bytes takes."""
    bandwidth, latency = _link
    return latency + (size / bandwidth if bandwidth else 0.0)


def report(text: str) -> None:
    """Add to ``reports``."""
    with _lock:
        _reports.append(text)


def reports() -> list[str]:
    """What was found since ``clear``."""
    with _lock:
        return list(_reports)


def clear() -> None:
    """Forget reports."""
    with _lock:
        _reports.clear()
        _accused.clear()


# --- what an operation is to its peers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one operation is to one peer.

    Attributes:
        kind: "send", "recv" or a collective's name.
        size: Bytes.
        detail: What else the two ranks must have alike.
        payload: The bytes that the peer gets, None if it gets none.
    """

    kind: str
    size: int
    detail: str = ""
    payload: bytes | None = None

    def __str__(self) -> str:
        return f"{self.kind} of {self.size} bytes{self.detail and f' ({self.detail})'}"

    def meets(self, other: Part) -> bool:
        """Whether the two ranks mean the same."""
        across = {"send": "recv", "recv": "send"}.get(self.kind, self.kind)
        return (across, self.size, self.detail) == (other.kind, other.size, other.detail)


@dataclass(frozen=True)
class Notice:
    """What a rank tells a peer when it issues operations: one, or several in one group.

    Attributes:
        source: Its rank in the communicator's group.
        number: How many the two have issued on this communicator before.
        place: Since when they count, and how many the two have issued since, on all communicators.
        parts: The operations.
        ready: When the bytes are with the peer, in seconds of this machine's monotonic clock.
        where: For reports: the communicator's name.
    """

    source: int
    number: int
    place: tuple[int, int]
    parts: tuple[Part, ...]
    ready: float
    where: str

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts)) + f" on {self.where}"


def disagreement(ours: Notice, theirs: Notice) -> str:
    """What is wrong with two operations that match by order; "" if nothing is."""

    def sorted_parts(notice: Notice, first: str) -> list[Part]:
        return sorted(notice.parts, key=lambda part: part.kind != first)  # stable: in the order of issue

    pairs = sorted_parts(ours, "send"), sorted_parts(theirs, "recv")
    if len(ours.parts) == len(theirs.parts) and all(a.meets(b) for a, b in zip(*pairs, strict=True)):
        return ""
    return (
        f"operation {ours.number} between ranks {ours.source} and {theirs.source} of {ours.where} does not match: rank "
        f"{ours.source} issued {' and '.join(map(str, ours.parts))}, rank {theirs.source} issued "
        f"{' and '.join(map(str, theirs.parts))}. NCCL would hang, or give bytes of another message"
    )


# --- one order over all communicators ---------------------------------------------------------------------------------


class Places:
    """The order in which this process issues operations that it has in common with another process.

    After a failure two processes have not issued the same: nothing is compared then, until both make a new group.
    """

    def __init__(self) -> None:
        self._issued: dict[str, list[str]] = {}
        self._starts: dict[str, int] = {}
        self._lost: set[str] = set()

    def take(self, peer: str, what: str) -> tuple[int, int]:
        """The next place with the process of this address; its first number changes when they begin anew."""
        with _lock:
            issued = self._issued.setdefault(peer, [])
            issued.append(what)
            return (-1 if peer in self._lost else self._starts.get(peer, 0)), len(issued) - 1

    def lose(self, peers: Iterable[str]) -> None:
        """Note that what was issued may not be what these processes issued."""
        with _lock:
            self._lost.update(peers)

    def lost(self) -> list[str]:
        """With whom nothing is compared."""
        with _lock:
            return sorted(self._lost)

    def begin(self, peer: str) -> None:
        """Begin anew with a process, which does the same."""
        with _lock:
            self._lost.discard(peer)
            self._issued[peer] = []
            self._starts[peer] = self._starts.get(peer, 0) + 1

    def compare(self, peer: str, ours: Notice, theirs: Notice) -> None:
        """Report, once for every peer, that two matching operations have different places."""
        with _lock:
            (start, here), (their_start, there) = ours.place, theirs.place
            if start < 0 or start != their_start or here == there or peer in _accused:
                return
            _accused.add(peer)
            issued = self._issued[peer]
            instead = issued[there] if there < len(issued) else "nothing yet"
            report(
                f"ranks {ours.source} and {theirs.source} of {ours.where} issue what they have in common in different "
                f"orders: operation {ours.number} ({ours}) is number {here} of all on rank {ours.source}, and number "
                f"{there} on rank {theirs.source}, where rank {ours.source} issued {instead}. On NCCL the two "
                "communicators may wait for each other for ever; issue all operations in one order on all ranks"
            )


places = Places()


# --- one thread a device ----------------------------------------------------------------------------------------------


@dataclass
class Issuers:
    """The threads that issue operations on one device's communicators.

    A thread may hand over to another, for good, when what it issued has been waited for.
    """

    device: str
    current: threading.Thread | None = None
    earlier: list[threading.Thread] = field(default_factory=list)

    def enter(self, what: str, pending: Sequence[threading.Thread]) -> None:
        """Report it if the current thread is one too many.

        Args:
            what: The operation it issues.
            pending: Which threads issued what has not been waited for.
        """
        thread = threading.current_thread()
        with _lock:
            before, self.current = self.current, thread
            self.earlier = [t for t in self.earlier if t.is_alive()]
            if before is None or before is thread or not before.is_alive():
                return
            returns = thread in self.earlier
            if before not in self.earlier:
                self.earlier.append(before)
            accusation = f"threads of {self.device}"
            if (returns or before in pending) and accusation not in _accused:
                _accused.add(accusation)
                report(
                    f"operations on communicators of {self.device} are issued from more than one thread: {what} from "
                    f'"{thread.name}" after others from "{before.name}". NCCL: host threads racing to launch NCCL on '
                    "same device; issue all operations of a device from one thread"
                )
