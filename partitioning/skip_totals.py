"""Bytes of the values that skip cells, summed for any stage by look-ups.

A value is given by the cell that stashes it, its source, and the cell that pops it, its target. A stage is given by its
first cell and the cell after its last, ``first`` and ``end``; both may be arrays of any shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gpipe.partitioning.cost import CellCost, SkipCost

Ints = NDArray[np.int64]
Cells = Ints | int


class SkipTotals:
    """Totals over the values of a chain of cells. Memory is proportional to sources times targets.

    Args:
        cells: Their costs; a value whose target is not among them leaves the last.

    Attributes:
        passing: For every cell the bytes of values that pass over it, or of their gradients. Shape (N,).
        crossing: Bytes of the values that pass from the first n cells to the others. Shape (N + 1,).
    """

    def __init__(self, cells: Sequence[CellCost]) -> None:
        ways = [(i, skip) for i, cell in enumerate(cells) for skip in cell.skips]
        count = len(cells)
        sources = np.array([i for i, _ in ways], dtype=np.int64)
        targets = np.array([min(i + skip.cells_on, count) for i, skip in ways], dtype=np.int64)

        def corner(number: Callable[[SkipCost], int]) -> _Corner:
            return _Corner(sources, targets, np.array([number(skip) for _, skip in ways], dtype=np.int64), count)

        self._values = corner(lambda skip: skip.value_bytes)
        self._let_go = corner(lambda skip: skip.value_bytes - skip.kept)
        self._handed_on = corner(lambda skip: skip.handed_on_bytes)
        self._waiting = corner(lambda skip: skip.passing)
        self.crossing: Ints = self._values.begun - self._values.ended
        self.passing: Ints = self._waiting.begun[:-1] - self._waiting.ended[1:]

    def entering(self, first: Cells, end: Cells) -> Ints:
        """Of the values that a stage pops and did not stash."""
        return self._values.entering(first, end)

    def let_go(self, first: Cells, end: Cells) -> Ints:
        """What of these autograd does not keep."""
        return self._let_go.entering(first, end)

    def handed_on(self, first: Cells, end: Cells) -> Ints:
        """What a stage stashes that only graphs of its own cells which pop it keep."""
        corner = self._handed_on
        inside: Ints = corner.ended[end] - corner(first, end)
        return inside

    def over(self, first: Cells, end: Cells) -> Ints:
        """Of the values in ``passing`` those that pass over the whole stage."""
        corner = self._waiting
        above: Ints = corner.begun[first] - corner(first, end)
        return above


class _Corner:
    """Sums of a number over the values with source < ``first`` and target < ``end``.

    Attributes:
        begun: Over those with source < n. Shape (N + 1,).
        ended: Over those with target < n; their sources are smaller still.
    """

    def __init__(self, sources: Ints, targets: Ints, numbers: Ints, count: int) -> None:
        rows, row = np.unique(sources, return_inverse=True)
        columns, column = np.unique(targets, return_inverse=True)
        self._table = np.zeros((len(rows) + 1, len(columns) + 1), dtype=np.int64)
        np.add.at(self._table, (row + 1, column + 1), numbers)
        self._table = self._table.cumsum(axis=0).cumsum(axis=1)
        cells = np.arange(count + 1)
        self._row, self._column = np.searchsorted(rows, cells), np.searchsorted(columns, cells)
        self.begun: Ints = self._table[self._row, -1]
        self.ended: Ints = self._table[-1, self._column]

    def __call__(self, first: Cells, end: Cells) -> Ints:
        total: Ints = self._table[self._row[first], self._column[end]]
        return total

    def entering(self, first: Cells, end: Cells) -> Ints:
        """Over those with source < ``first`` <= target < ``end``."""
        total: Ints = self(first, end) - self.ended[first]
        return total
