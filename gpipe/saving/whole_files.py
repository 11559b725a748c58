"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what was written takes ``path``'s place at once, or not at all.

    Raises:
        OSError: If writing fails, as on a full disk. What stood at ``path`` before stands there still.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch()
        mode = beside.stat().st_mode  # what the user's umask says; some libraries have ideas of their own
        yield beside
        beside.chmod(mode)
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def sweep(path: Path) -> None:
    """Remove what processes that were killed left of ``path``, half written; nobody else may be writing it now."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(OSError):
            left.unlink()


def sync(path: Path) -> None:
    """Have the disk hold a file or a folder, so that not even a power cut leaves an empty one under a good name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cause(error: Exception) -> Exception:
    """The disk's own error, where torch's complaint about its file hides it."""
    hidden = error.__context__ if isinstance(error, RuntimeError) else None
    return hidden if isinstance(hidden, OSError) else error
