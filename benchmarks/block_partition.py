"""Block partition of a sequence (Bárány and Grinberg, arXiv 1308.2452), which torchgpipe balances by, restated.

It promises that the largest and the smallest block differ by no more than the largest element, not that the largest
block is smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def block_partition(sizes: Sequence[float], blocks: int) -> list[int]:
    """Number of elements per block.

    From an even division, the smallest block is given elements from the side of the largest, one at a time, until
    the two differ by at most the largest element.

    Args:
        sizes: The elements, none negative.
        blocks: Number of blocks, 1 to the number of elements.
    """
    largest = max(sizes)
    cuts = [len(sizes) * k // blocks for k in range(blocks + 1)]
    while True:
        sums = [sum(sizes[a:b]) for a, b in pairwise(cuts)]
        p = sums.index(max(sums))
        q = min((k for k in range(blocks) if sums[k] == min(sums)), key=lambda k: abs(k - p))
        if sums[p] <= sums[q] + largest:
            return [b - a for a, b in pairwise(cuts)]
        step = 1 if p < q else -1
        giver = next(h for h in range(q - step, p - step, -step) if sums[h] > sums[h + step])
        if step == 1:
            cuts[giver + 1] -= 1
        else:
            cuts[giver] += 1
