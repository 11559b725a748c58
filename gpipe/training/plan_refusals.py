"""Combinations that cannot be had: why, and what would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from gpipe.partitioning.infeasible import Infeasible
from gpipe.partitioning.units import readable_bytes


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot be had.

    Attributes:
        stages: K.
        chunks: M.
        reason: In short.
        infeasible: The solver's own reason, where it was asked and memory is what lacks.
        lacks_memory: Whether memory is what lacks, asked or not.
    """

    stages: int
    chunks: int
    reason: str
    infeasible: Infeasible | None = None
    lacks_memory: bool = False


def lacking_memory(stages: int, chunks: int, error: Infeasible) -> Refusal:
    """A refusal by the solver."""
    first, last = error.cells
    cells = f"cell {first}" if first == last else f"cells {first} .. {last}"
    reason = f"{readable_bytes(error.missing_bytes)} too much on stage {error.stage} ({cells})"
    return Refusal(stages, chunks, reason, error, lacks_memory=True)


def lacking_more(stages: int, chunks: int, than: int) -> Refusal:
    """A refusal without a question: micro-batches larger than those of ``than`` chunks, which do not fit."""
    return Refusal(stages, chunks, f"needs more memory than with {than} chunks", lacks_memory=True)


def would_do(refusals: Sequence[Refusal], *, alike: bool) -> str:
    """The smallest memory and the smallest number of devices with which one of these would fit.

    Args:
        refusals: At least one of them by the solver.
        alike: Whether all devices have the same memory; if not, there is no saying how many more would do.
    """
    asked = [(refusal, refusal.infeasible) for refusal in refusals if refusal.infeasible is not None]
    nearest, error = min(asked, key=lambda pair: pair[1].missing_bytes)
    where = f"with {counted(nearest.stages, 'stage')} and {counted(nearest.chunks, 'chunk')}"
    if alike:
        would = [f"--memory {size_above(error.memory_limit[0] or 0)} {where}"]
    else:
        would = [f"{size_above(error.missing_bytes)} more on every device {where}"]
    numbers = [(error.stages, refusal.chunks) for refusal, error in asked if error.stages is not None]
    if alike and numbers:
        stages, chunks = min(numbers)
        would.append(f"{stages} such devices with {counted(chunks, 'chunk')}")
    return "; or ".join(would)


def summary(refusals: Sequence[Refusal]) -> list[str]:
    """One line for each number of stages and kind of reason."""

    def kind(refusal: Refusal) -> tuple[int, str]:
        return refusal.stages, "" if refusal.lacks_memory else refusal.reason

    lines = []
    for (stages, reason), group in groupby(sorted(refusals, key=lambda r: (kind(r), r.chunks)), key=kind):
        members = list(group)
        asked = [(refusal, refusal.infeasible) for refusal in members if refusal.infeasible is not None]
        if asked:
            nearest, error = min(asked, key=lambda pair: pair[1].missing_bytes)
            larger = f"--memory {size_above(max(limit or 0 for limit in error.memory_limit))}"
            reason = f"{nearest.reason} with {counted(nearest.chunks, 'chunk')}; {larger} would do"
        chunks = ", ".join(str(refusal.chunks) for refusal in members)
        lines.append(f"{counted(stages, 'stage')}, chunks {chunks}: {reason}")
    return lines


def size_above(size: int) -> str:
    """The next larger size that ``--memory`` takes, such as ``17.36GiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{math.ceil(100 * size / 2**power) / 100:.2f}{unit}"
    return str(size)


def counted(count: int, what: str) -> str:
    """Such as ``1 stage``, ``2 stages``."""
    return f"{count} {what}{'s' if count != 1 else ''}"
