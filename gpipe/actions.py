"""One step of a worker, and many of them in a row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpipe.rows import Rows

Codes = NDArray[np.int8]
Ints = NDArray[np.int32]


class Kind(StrEnum):
    """What a worker does with one micro-batch on one stage.

    A backward is either one ``BACKWARD``, or an ``INPUT_GRADIENT`` (what the stage before waits for) and, any time
    later, a ``WEIGHT_GRADIENT`` (zero bubble, arXiv 2401.10241, section 2).
    """

    FORWARD = "F"
    RECOMPUTE = "R"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


KINDS = tuple(Kind)
"""Kinds by their code in arrays."""

F, R, B, I, W = range(5)  # noqa: E741 - the letters of the notation


class Action(NamedTuple):
    """One step of a worker; prints as ``2F0``."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


class ScheduleError(ValueError):
    """A schedule that cannot be run: an action is missing, doubled, misordered, or waits for ever."""


class Actions(Rows[Action]):
    """What a worker does, in order: a sequence of ``Action``, stored as three arrays.

    Args:
        stage: Shape (N,).
        kind: Shape (N,): codes, indices of ``KINDS``.
        micro_batch: Shape (N,).
    """

    __slots__ = ()

    def __init__(self, stage: NDArray[Any], kind: NDArray[Any], micro_batch: NDArray[Any]) -> None:
        super().__init__(
            np.asarray(stage, dtype=np.int32), np.asarray(kind, dtype=np.int8), np.asarray(micro_batch, dtype=np.int32)
        )

    @classmethod
    def of(cls, actions: Iterable[Action]) -> Actions:
        """The same actions, checked.

        Raises:
            ScheduleError: Something is no action: not a triple of an int, a kind and an int.
        """
        if isinstance(actions, Actions):
            return actions
        rows = [_checked(action) for action in actions]
        table = np.array(rows, dtype=np.int32).reshape(len(rows), 3)
        return cls(*(np.ascontiguousarray(column) for column in table.T))

    @staticmethod
    def rows(*columns: list[int]) -> Iterator[Action]:
        """The actions of these stages, codes and micro-batches."""
        stage, code, micro_batch = columns
        return map(Action, stage, map(KINDS.__getitem__, code), micro_batch)

    @property
    def stage(self) -> Ints:
        """Stages, shape (N,)."""
        return self.columns[0]

    @property
    def kind(self) -> Codes:
        """Codes of the kinds, shape (N,)."""
        return self.columns[1]

    @property
    def micro_batch(self) -> Ints:
        """Micro-batches, shape (N,)."""
        return self.columns[2]


def _checked(action: Any) -> tuple[int, int, int]:
    if not isinstance(action, tuple) or len(action) != 3:
        raise ScheduleError(f"expected an Action(stage, kind, micro_batch), got {action!r}")
    stage, kind, micro_batch = action
    for name, value in (("stage", stage), ("micro_batch", micro_batch)):
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
            raise ScheduleError(f"{name} of an action must be an int below 2**31, got {value!r} in {action!r}")
    if kind not in KINDS:
        known = ", ".join(repr(k.value) for k in KINDS)
        raise ScheduleError(f"kind of an action must be one of {known}, got {kind!r} in {action!r}")
    return stage, KINDS.index(kind), micro_batch
