"""Which rows a batch holds and what is drawn for it: functions of (seed, step) and of nothing else.

No global generator is read or moved, so a resumed run sees the batches of an uninterrupted one, and the number of
pipeline stages, which draw numbers of their own, changes nothing.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy
import torch
from torch import Tensor

ORDER, DRAW, SPLIT = range(3)  # what a generator is for: the rows' order, augmentation and captions, held-out rows


def generator(seed: int, purpose: int, index: int) -> torch.Generator:
    """A CPU generator of its own for every (seed, purpose, index); all three are at least 0.

    Raises:
        ValueError: If ``seed`` is negative.
    """
    if seed < 0:
        raise ValueError(f"expected a seed of at least 0, got {seed}: choose another seed")
    state = numpy.random.SeedSequence([seed, purpose, index]).generate_state(1, numpy.uint64)
    return torch.Generator().manual_seed(int(state[0] >> numpy.uint64(1)))


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, total: int) -> Tensor:
    return torch.randperm(total, generator=generator(seed, ORDER, epoch), device="cpu")


def batch_rows(seed: int, step: int, rows: int, total: int) -> Tensor:
    """The rows of a data set that batch number ``step`` holds.

    The epochs' permutations are laid end to end and batch ``step`` is the ``rows`` entries from ``step * rows`` on. So
    every row comes up once an epoch, and a batch that runs across an epoch's end is as full as any other.

    Args:
        seed: The run's seed, at least 0.
        step: Number of the batch, from 0.
        rows: Rows of a batch, from 1 to ``total``.
        total: Rows of the data set.

    Returns:
        (rows,) int64 row numbers.

    Raises:
        ValueError: If ``step`` is negative, ``rows`` is below 1 or the data set has fewer than ``rows`` rows.
    """
    if step < 0:
        raise ValueError(f"expected a step of at least 0, got {step}: steps count from 0")
    if not 1 <= rows <= total:
        raise ValueError(
            f"expected a batch size from 1 to {total}, the rows of the training data, got {rows}: "
            "choose another batch size or give more data"
        )
    parts = []
    first, missing = step * rows, rows
    while missing:
        epoch, start = divmod(first, total)
        part = _permutation(seed, epoch, total)[start : start + missing]
        parts.append(part)
        first, missing = first + len(part), missing - len(part)
    return torch.cat(parts)


def hold_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Divide rows into two parts with the same mix of labels; always the same for the same labels.

    The rows are shuffled, sorted by label, and evenly spaced ones held out. The shuffle does not depend on the run's
    seed: two runs that differ in their seed are judged on the same rows.

    Args:
        labels: (N,) int64; give zeros where rows have no labels.
        fraction: Share of the rows to hold out, above 0 and at most 0.5.

    Returns:
        Row numbers, in increasing order: (N - H,) kept and (H,) held out, where H = ceil(fraction * N).

    Raises:
        ValueError: If ``fraction`` is outside its range, or there are fewer than 2 rows.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"expected a held-out fraction above 0 and at most 0.5, got {fraction}")
    total = len(labels)
    if total < 2:
        raise ValueError(f"expected at least 2 rows to hold some out, got {total}: give more data")
    shuffled = torch.randperm(total, generator=generator(0, SPLIT, 0), device="cpu")
    by_label = shuffled[torch.sort(labels[shuffled], stable=True).indices]
    quota = [math.ceil(round(row * fraction, 9)) for row in range(total + 1)]
    chosen = torch.tensor([after > before for before, after in itertools.pairwise(quota)])
    return by_label[~chosen].sort().values, by_label[chosen].sort().values
