"""The division of a chain whose largest stage is smallest, by one number per cell."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def split_evenly(sizes: Sequence[float], stages: int) -> list[int]:
    """The number of cells per stage for which the largest stage is smallest.

    Args:
        sizes: A non-negative number per cell, such as its parameter count.
        stages: Number of stages, 1 to the number of cells; none is left empty.

    Raises:
        ValueError: There are more stages than cells.
    """
    cells = len(sizes)
    if not 1 <= stages <= cells:
        raise ValueError(f"{cells} cells can be divided into 1 to {cells} stages, got {stages}")
    before = [0.0, *accumulate(sizes)]
    # best[n] is the largest stage of the best division of the first n cells into k stages; cut[k][n] its last cut.
    best = [float("inf")] * (cells + 1)
    best[0] = 0.0
    cuts: list[list[int]] = []
    for k in range(1, stages + 1):
        row, cut = [float("inf")] * (cells + 1), [0] * (cells + 1)
        for n in range(k, cells - (stages - k) + 1):
            row[n], cut[n] = min((max(best[i], before[n] - before[i]), i) for i in range(k - 1, n))
        best = row
        cuts.append(cut)
    ends = [cells]
    for cut in reversed(cuts):
        ends.append(cut[ends[-1]])
    ends.reverse()
    return [right - left for left, right in pairwise(ends)]
