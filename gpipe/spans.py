"""What a timeline is made of: records of who did what from when to when, in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpipe.actions import Action, Actions
from gpipe.rows import Rows

Floats = NDArray[np.float64]
Direction = Literal["forward", "backward"]

_ROUNDING = 1e-9  # of the whole time
_DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


class Span(NamedTuple):
    """One action's computation, waiting excluded; of a run, seconds of ``time.perf_counter``, also of accelerators."""

    action: Action
    start: float
    end: float


class Transfer(NamedTuple):
    """A message between two stages, from when it leaves to when it has arrived; stages and micro-batch are numbers."""

    source: int
    target: int
    direction: Direction
    micro_batch: int
    start: float
    end: float


class Flush(NamedTuple):
    """What a worker does after its last action: ``"all_reduce"`` of gradients, or ``"optimizer"``."""

    worker: int
    name: str
    start: float
    end: float


class Spans(Rows[Span]):
    """The spans of a worker: a sequence of ``Span``, stored as arrays of stage, kind, micro-batch, start and end."""

    __slots__ = ()

    @classmethod
    def of(cls, spans: Iterable[Span]) -> Spans:
        """The same spans."""
        if isinstance(spans, Spans):
            return spans
        rows = list(spans)
        times = np.array([row[1:] for row in rows], dtype=np.float64).reshape(len(rows), 2)
        return cls(*Actions.of(row[0] for row in rows).columns, *times.T)

    @staticmethod
    def rows(*columns: list[Any]) -> Iterator[Span]:
        """The spans of these columns' values."""
        *actions, start, end = columns
        return map(Span, Actions.rows(*actions), start, end)

    @property
    def stage(self) -> NDArray[np.int32]:
        """Stages."""
        return self.columns[0]

    @property
    def kind(self) -> NDArray[np.int8]:
        """Codes of the kinds, indices of ``actions.KINDS``."""
        return self.columns[1]

    @property
    def start(self) -> Floats:
        """Seconds."""
        return self.columns[3]

    @property
    def end(self) -> Floats:
        """Seconds."""
        return self.columns[4]


class Transfers(Rows[Transfer]):
    """Messages: a sequence of ``Transfer``, stored as arrays; the direction as 0 for forward, 1 for backward."""

    __slots__ = ()

    @classmethod
    def of(cls, transfers: Iterable[Transfer]) -> Transfers:
        """The same transfers."""
        if isinstance(transfers, Transfers):
            return transfers
        rows = [(s, t, _DIRECTIONS.index(d), m, start, end) for s, t, d, m, start, end in transfers]
        table = np.array(rows, dtype=np.float64).reshape(len(rows), 6).T
        return cls(*(column.astype(np.int32) for column in table[:4]), *table[4:])

    @staticmethod
    def rows(*columns: list[Any]) -> Iterator[Transfer]:
        """The transfers of these columns' values."""
        source, target, direction, *rest = columns
        return map(Transfer, source, target, map(_DIRECTIONS.__getitem__, direction), *rest)

    @property
    def target(self) -> NDArray[np.int32]:
        """Receiving stages."""
        return self.columns[1]

    @property
    def start(self) -> Floats:
        """Seconds."""
        return self.columns[4]

    @property
    def end(self) -> Floats:
        """Seconds."""
        return self.columns[5]


class Level(NamedTuple):
    """Bytes that are held from a time on, until the next level's."""

    time: float
    bytes: int


class Memory(Rows[Level]):
    """Bytes of one stage over time: a sequence of ``Level`` by rising time.

    Args:
        times: Seconds, shape (N,).
        bytes: Shape (N,).
    """

    __slots__ = ()

    def __init__(self, times: Any, bytes: Any) -> None:
        super().__init__(np.asarray(times, dtype=np.float64), np.asarray(bytes, dtype=np.int64))

    @classmethod
    def of_changes(
        cls, static: int, holds: Sequence[tuple[Floats, Floats, int]], kept: Sequence[tuple[float, int]] = ()
    ) -> Memory:
        """What is held, from times at which something begins and ceases to be.

        Args:
            static: Bytes held from time 0 to the end.
            holds: Arrays of times from which, and until which, and the bytes of each. What ends where another begins
                is never held together with it; times that rounding alone tells apart are the same.
            kept: Times from which something is held to the end, and the bytes of each.
        """
        begins = [np.zeros(1), *(np.array([time]) for time, _ in kept)]
        times = np.concatenate([*begins, *(part for begin, end, _ in holds for part in (begin, end))])
        changes = [np.full(1, static), *(np.full(1, size) for _, size in kept)]
        for begin, _, size in holds:
            changes += [np.full(len(begin), size), np.full(len(begin), -size)]
        order = np.argsort(times)
        times, change = times[order], np.concatenate(changes)[order]
        first = np.flatnonzero(np.diff(times, prepend=-np.inf) > _ROUNDING * times[-1])
        held = np.cumsum(np.add.reduceat(change, first))
        changed = np.diff(held, prepend=-1) != 0
        return cls(times[first][changed], held[changed])

    @staticmethod
    def rows(*columns: list[Any]) -> Iterator[Level]:
        """The levels of these times and bytes."""
        return map(Level, *columns)

    @property
    def times(self) -> Floats:
        """Seconds."""
        return self.columns[0]

    @property
    def bytes(self) -> NDArray[np.int64]:
        """Bytes from each of ``times`` on."""
        return self.columns[1]

    @property
    def peak(self) -> int:
        """The most bytes held at a time."""
        return int(self.bytes.max(initial=0))

    @classmethod
    def total(cls, parts: Sequence[Memory]) -> Memory:
        """What several stages hold together."""
        times = np.unique(np.concatenate([part.times for part in parts])) if parts else np.zeros(0)
        held = np.zeros(len(times), dtype=np.int64)
        for part in parts:
            index = np.searchsorted(part.times, times, side="right")
            held += np.concatenate([np.zeros(1, dtype=np.int64), part.bytes])[index]
        return cls(times, held)
