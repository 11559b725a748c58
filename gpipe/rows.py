"""Many equal records as a few arrays, read as a sequence: a million of them cost megabytes and no objects."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Generic, Self, SupportsIndex, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Row = TypeVar("Row")


class Rows(Sequence[Row], Generic[Row]):
    """An immutable sequence of records, stored column by column.

    Args:
        columns: One array per field, all of the same length; they are made read-only.
    """

    __slots__ = ("columns",)

    def __init__(self, *columns: NDArray[Any]) -> None:
        for column in columns:
            column.flags.writeable = False
        self.columns = columns

    @staticmethod
    @abstractmethod
    def rows(*columns: list[Any]) -> Iterator[Row]:
        """The records of these columns' values."""

    def __len__(self) -> int:
        return len(self.columns[0])

    def __iter__(self) -> Iterator[Row]:
        return self.rows(*(column.tolist() for column in self.columns))

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | Self:
        if isinstance(index, slice):
            return type(self)(*(column[index] for column in self.columns))
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)}, none at index {i}")
        i %= len(self)
        return next(iter(self[i : i + 1]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return all(np.array_equal(a, b) for a, b in zip(self.columns, other.columns, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(column.tobytes() for column in self.columns))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.columns  # read-only again when unpickled

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self[:8]))
        return f"{type(self).__name__}({len(self)}: {shown}{', ...' if len(self) > 8 else ''})"
