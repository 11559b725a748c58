"""What the running cell may ask about its situation: per thread, set by the stage around a cell's forward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Phase:
    """The forward a stage is running in this thread.

    Attributes:
        micro_batch: Index of the micro-batch.
        checkpointing: Activations are dropped now and recomputed before backward.
        recomputing: This is the recompute, or the second of two passes.
        statistics: Where deferred batch-norm layers put this micro-batch's statistics, if they do.
    """

    micro_batch: int
    checkpointing: bool = False
    recomputing: bool = False
    statistics: dict[Any, Any] | None = None


_thread = threading.local()


def current_phase() -> Phase | None:
    """The phase of this thread, None outside a pipeline."""
    phase: Phase | None = getattr(_thread, "phase", None)
    return phase


@contextmanager
def running(phase: Phase) -> Iterator[None]:
    """Make ``phase`` the current one inside."""
    before = current_phase()
    _thread.phase = phase
    try:
        yield
    finally:
        _thread.phase = before


def is_checkpointing() -> bool:
    """Whether the running cell's activations are dropped now and will be recomputed before backward."""
    phase = current_phase()
    return phase is not None and phase.checkpointing


def is_recomputing() -> bool:
    """Whether the running cell is run again on the same micro-batch, before its backward."""
    phase = current_phase()
    return phase is not None and phase.recomputing
