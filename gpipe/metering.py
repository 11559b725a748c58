"""Peak bytes of every stage, counted while a mini-batch runs as if each stage had a device of its own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from gpipe.memory import copied
from gpipe.partitioning.live import LiveBytes


class Meters:
    """Counts for the stages of this process their parameters, the storages their operators make, and what they receive.

    Args:
        parameter_bytes: By stage what is there before, and stays.
        stages: How many stages the whole pipeline has.
    """

    def __init__(self, parameter_bytes: Mapping[int, int], stages: int) -> None:
        self._parameter_bytes = parameter_bytes
        self._stages = stages
        self._meters = {stage: LiveBytes() for stage in parameter_bytes}

    def levels(self) -> list[tuple[list[float], list[int]]]:
        """Per stage times, in seconds of ``time.perf_counter``, and the bytes held from each of them on.

        Of stages that are elsewhere none.
        """
        found: list[tuple[list[float], list[int]]] = [([], []) for _ in range(self._stages)]
        for stage, meter in self._meters.items():
            before = self._parameter_bytes[stage]
            found[stage] = [time for time, _ in meter.levels], [size + before for _, size in meter.levels]
        return found

    def counting(self, stage: int) -> AbstractContextManager[Any]:
        """Count what this thread's operators make inside for ``stage``."""
        return self._meters[stage]

    def delivered(self, stage: int, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` on the account of ``stage``, as if it had come from another device."""
        copy: Tensor = copied([tensor])[0]
        self._meters[stage].book(copy)
        return copy
