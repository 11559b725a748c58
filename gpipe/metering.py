"""Peak bytes of every stage, counted while a mini-batch runs as if each stage had a device of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gpipe.memory import copied
from gpipe.partitioning.live import LiveBytes


class Meters:
    """Counts for every stage the storages its operators make and the tensors it receives.

    Parameters, and whatever else was there before, are not in it; what the caller's loss makes is not either.
    """

    def __init__(self, stages: int) -> None:
        self._meters = [LiveBytes() for _ in range(stages)]

    @property
    def peaks(self) -> tuple[int, ...]:
        """Per stage the most bytes that were held at a time."""
        return tuple(meter.peak for meter in self._meters)

    def counting(self, stage: int) -> AbstractContextManager[Any]:
        """Count what this thread's operators make inside for ``stage``."""
        return self._meters[stage]

    def delivered(self, stage: int, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` on the account of ``stage``, as if it had come from another device."""
        copy: Tensor = copied([tensor])[0]
        self._meters[stage].book(copy)
        return copy
