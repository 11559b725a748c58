"""What the ranks of a group do together: it succeeds on all of them, or the same error is raised on all."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

_KINDS: dict[str, type[Exception]] = {"OSError": OSError, "TypeError": TypeError, "ValueError": ValueError}


class Together:
    """The ranks of a group, with a gloo group of their own; one process alone where there is no process group.

    Made on every rank alike, and called on every rank alike, by one thread at a time.

    Args:
        group: The ranks, of which this one must be one. None takes the whole world.

    Raises:
        ValueError: This rank is not in ``group``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group: weakref.ref[dist.ProcessGroup] | None = None  # torch's: its threads end where it is destroyed
        self.rank, self.size = 0, 1
        self._lost: str | None = None
        if not (dist.is_available() and dist.is_initialized()):
            return
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group given: leave it out here, or give its own")
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.size > 1:
            ranks = None if group is None else dist.get_process_group_ranks(group)
            own = dist.new_group(ranks, backend="gloo", use_local_synchronization=ranks is not None)
            assert isinstance(own, dist.ProcessGroup)
            self._group = weakref.ref(own)

    def each(self, act: Callable[[], T]) -> list[T]:
        """Do something on every rank.

        Args:
            act: What this rank does. What it gives, or raises, goes to all ranks.

        Returns:
            What it gave on every rank, by rank.

        Raises:
            OSError, TypeError, ValueError: The first rank whose ``act`` failed raised such a one; the message, the
                same on all ranks, names the rank.
            RuntimeError: It raised something else, or a rank can no longer be reached.
        """
        if self._lost is not None:
            raise RuntimeError(self._lost)
        value: T | None = None
        failed: BaseException | None = None
        try:
            value = act()
        except BaseException as error:
            if self._group is None:
                raise
            failed = error
        entries = self._exchanged((None if failed is None else _told(failed), value))
        if failed is not None and not isinstance(failed, Exception):
            raise failed
        for rank, (told, _) in enumerate(entries):
            if told is not None:
                kind, text = told
                raise _KINDS.get(kind, RuntimeError)(f"rank {rank}: {text}") from failed
        return [given for _, given in entries]  # type: ignore[misc]  # who told of no failure gave a value

    def first(self, act: Callable[[], T]) -> T:
        """Do something on rank 0 alone; what it gave comes to all ranks, as does its error."""
        return self.each(lambda: act() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _exchanged(
        self, entry: tuple[tuple[str, str] | None, T | None]
    ) -> list[tuple[tuple[str, str] | None, T | None]]:
        if self._group is None:
            return [entry]
        group = self._group()
        if group is None:
            raise RuntimeError("the process group was destroyed: save, and wait for saves, before that")
        entries: list[tuple[tuple[str, str] | None, T | None]] = [entry] * self.size
        try:
            dist.all_gather_object(entries, entry, group=group)
        except BaseException as error:
            self._leave()
            if isinstance(error, (RuntimeError, ValueError)):
                self._lost = f"another rank can no longer be reached ({error}): end all ranks and start again"
                raise RuntimeError(self._lost) from error
            raise
        return entries

    def _leave(self) -> None:
        """Close this rank's connections: who waits for it hears of it, and need not wait for a time-out."""
        self._lost = "this rank left its group in the middle of a save: end all ranks and start again"
        group = None if self._group is None else self._group()
        self._group = None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)


def _told(error: BaseException) -> tuple[str, str]:
    """The kind of an error, and what to tell of it."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "")
    return kind, str(error) if kind else f"{type(error).__name__}: {error}"
