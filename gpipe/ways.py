"""What a stage hands to stages beyond the next, and what carries it while the stage runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from gpipe.boundary import Boundary
from gpipe.memory import by_storage
from gpipe.partitioning.skips import Key, PartCarrier, Skip

Bundle = tuple[int, tuple[Key, ...]]
"""Another stage, and the values that come from it, or go to it, in one message."""


@dataclass(frozen=True)
class Ways:
    """The skip connections of a stage with others.

    Attributes:
        incoming: What comes from which stage.
        outgoing: What goes to which stage.
    """

    incoming: tuple[Bundle, ...] = ()
    outgoing: tuple[Bundle, ...] = ()

    @property
    def sources(self) -> tuple[int, ...]:
        """The stages that something comes from."""
        return tuple(stage for stage, _ in self.incoming)

    @property
    def targets(self) -> tuple[int, ...]:
        """The stages that something goes to."""
        return tuple(stage for stage, _ in self.outgoing)


def ways_of(skips: Sequence[Skip], balance: Sequence[int]) -> list[Ways]:
    """The ways of every stage.

    Args:
        skips: In the order of the cells that pop.
        balance: Cells per stage.
    """
    ends = list(accumulate(balance))
    pairs: dict[tuple[int, int], list[Key]] = {}
    for skip in skips:
        source, target = bisect_right(ends, skip.source), bisect_right(ends, skip.target)
        if source != target:
            pairs.setdefault((source, target), []).append(skip.key)
    return [
        Ways(
            incoming=tuple((a, tuple(keys)) for (a, b), keys in pairs.items() if b == k),
            outgoing=tuple((b, tuple(keys)) for (a, b), keys in pairs.items() if a == k),
        )
        for k in range(len(balance))
    ]


class StageCarrier(PartCarrier):
    """Carries the values of one micro-batch through a stage: in from others, within, and out to others.

    Args:
        ways: Of the stage.
        arrived: For every bundle that comes in its values.
    """

    def __init__(self, ways: Ways, arrived: Sequence[Sequence[Tensor | None]]) -> None:
        bundles = zip(ways.incoming, arrived, strict=True)
        super().__init__({k: v for (_, keys), values in bundles for k, v in zip(keys, values, strict=True)})
        self._ways = ways

    def bundles(self) -> list[tuple[Tensor | None, ...]]:
        """For every bundle that goes out its values."""
        return [tuple(self.leaving(keys)) for _, keys in self._ways.outgoing]


def in_own_memory(parts: Sequence[Boundary]) -> list[Boundary]:
    """What leaves a stage, such that no two parts share memory: whoever receives one may write to it."""
    if len(parts) == 1:
        return list(parts)
    found: list[Boundary] = []
    seen: set[int] = set()
    for part in parts:
        own = {tensors[0].untyped_storage().data_ptr() for tensors in by_storage(part.leaves)}
        found.append(part.copy() if own & seen else part)
        seen |= own
    return found


def joined(parts: Sequence[Boundary]) -> Boundary:
    """Several boundaries as one, whose tree is the tuple of theirs; no leaf of one is a leaf of another."""
    if len(parts) == 1:
        return parts[0]
    return Boundary.tuple_of(parts)


def divided(leaves: Sequence[Any], parts: Sequence[int]) -> list[list[Any]]:
    """``leaves`` in pieces of these lengths."""
    if len(parts) == 1:
        return [list(leaves)]
    ends = list(accumulate(parts))
    return [list(leaves[end - size : end]) for end, size in zip(ends, parts, strict=True)]
