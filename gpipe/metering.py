"""Peak bytes of every stage, counted while a mini-batch runs as if each stage had a device of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gpipe.memory import copied
from gpipe.partitioning.live import LiveBytes


class Meters:
    """Counts for every stage its parameters, the storages its operators make, and the tensors it receives.

    Args:
        parameter_bytes: Per stage what is there before, and stays.
    """

    def __init__(self, parameter_bytes: Sequence[int]) -> None:
        self._parameter_bytes = parameter_bytes
        self._meters = [LiveBytes() for _ in parameter_bytes]

    def levels(self) -> list[tuple[list[float], list[int]]]:
        """Per stage times, in seconds of ``time.perf_counter``, and the bytes held from each of them on."""
        return [
            ([time for time, _ in meter.levels], [size + before for _, size in meter.levels])
            for meter, before in zip(self._meters, self._parameter_bytes, strict=True)
        ]

    def counting(self, stage: int) -> AbstractContextManager[Any]:
        """Count what this thread's operators make inside for ``stage``."""
        return self._meters[stage]

    def delivered(self, stage: int, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` on the account of ``stage``, as if it had come from another device."""
        copy: Tensor = copied([tensor])[0]
        self._meters[stage].book(copy)
        return copy
