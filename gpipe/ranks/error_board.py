"""Where a rank that fails says so, out of band, and the others read it: a key in the world's store."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_INTERVAL = 0.2  # seconds between two looks at the board
_GRACE = 2.0  # seconds to wait for others: for them to hear, or for a failure to be posted


class OtherRankFailed(RuntimeError):
    """The step was ended because of another rank, which says why."""


class RankLost(OtherRankFailed):
    """Another rank can no longer be reached: it has ended, with or without a word."""


@dataclass(frozen=True)
class Failure:
    """The first exception of a step.

    Attributes:
        rank: Where it was raised.
        step: Training steps done before.
        error: Its type and message.
        where: Stage, cell, micro-batch and action, or what else is known.
    """

    rank: int
    step: int
    error: str
    where: str

    @classmethod
    def of(cls, error: BaseException, rank: int, step: int) -> Failure:
        """What there is to say about ``error``."""
        notes = [n.removeprefix("gpipe: ") for n in getattr(error, "__notes__", ()) if n.startswith("gpipe: ")]
        where = notes[0] if notes else "before or after the actions of its stages"
        return cls(rank, step, f"{type(error).__name__}: {error}", where)

    def __str__(self) -> str:
        return f"rank {self.rank} failed in step {self.step} with {self.error} ({self.where})"


class ErrorBoard:
    """One key of the store, watched while a step runs.

    Args:
        store: The world's store, with a prefix of the pipe's own.
        ranks: How many there are.
    """

    def __init__(self, store: Store, ranks: int) -> None:
        self._store = store
        self._ranks = ranks
        self._jobs: SimpleQueue[tuple[threading.Event, Callable[[], None]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=_watch, args=(store, self._jobs), name="gpipe-watch", daemon=True)
        self.thread.start()

    @contextmanager
    def watched(self, on_failure: Callable[[], None]) -> Iterator[None]:
        """Call ``on_failure``, from another thread, if a rank fails, or the store is lost, while the inside runs."""
        ended = threading.Event()
        self._jobs.put((ended, on_failure))
        try:
            yield
        finally:
            ended.set()

    def post(self, failure: Failure, patient: bool = True) -> None:
        """Say that this rank failed, if none has before; ``patient`` waits a moment for the others to hear of it."""
        with suppress(RuntimeError):  # a lost store: nobody is left to tell
            self._store.compare_set("failure", "", json.dumps(asdict(failure)))
            self._store.add("heard", 1)
            deadline = time.monotonic() + (_GRACE if patient else 0.0)
            while self._store.add("heard", 0) < self._ranks and time.monotonic() < deadline:
                time.sleep(_INTERVAL / 4)

    def read(self, patient: bool = False) -> Failure | None:
        """The first failure, None if there is none; ``patient`` waits a moment for one."""
        deadline = time.monotonic() + (_GRACE if patient else 0.0)
        with suppress(RuntimeError):
            while not self._store.check(["failure"]):
                if time.monotonic() >= deadline:
                    return None
                time.sleep(_INTERVAL / 4)
            return Failure(**json.loads(self._store.get("failure")))
        return None

    def close(self) -> None:
        """Let the thread end."""
        self._jobs.put(None)


def _watch(store: Store, jobs: SimpleQueue[tuple[threading.Event, Callable[[], None]] | None]) -> None:
    while (job := jobs.get()) is not None:
        ended, on_failure = job
        while not ended.is_set():
            try:
                failed = store.check(["failure"])
                if failed:
                    store.add("heard", 1)
            except RuntimeError:
                failed = True
            if failed:
                on_failure()
                break
            ended.wait(_INTERVAL)
        del job, ended, on_failure
