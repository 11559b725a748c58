"""Whose bytes are whose: the footprints of a chain's cells as what each answers for, none counted twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from gpipe.partitioning.alone import Alone
from gpipe.partitioning.cost import SkipCost
from gpipe.partitioning.footprint import Footprint, Popped, Stashed


class Owned(NamedTuple):
    """The bytes a cell of a chain answers for; see ``CellCost``, whose names these are."""

    activation_bytes: int
    boundary_bytes: int
    workspace_bytes: int
    kept_input_bytes: int
    handed_on_bytes: int
    skips: tuple[SkipCost, ...]


class _Way(NamedTuple):
    source: int
    target: int
    stashed: Stashed
    popped: Popped


def owned_bytes(cells: Sequence[Alone], footprints: Sequence[Footprint]) -> list[Owned]:
    """Per cell what autograd keeps of it, and of what it gives others what only their graphs keep; and all the rest."""
    owned = []
    skips: list[list[SkipCost]] = [[] for _ in cells]
    arriving = [0] * len(cells)  # of what a cell pops: kept by nobody, but there while the cell runs
    for way, kept in _kept_elsewhere(_ways(cells, footprints), footprints):
        size, keeps = way.stashed.bytes, way.popped.kept
        skips[way.source].append(
            SkipCost(
                cells_on=way.target - way.source,
                value_bytes=size,
                kept_bytes=size if keeps else 0,
                handed_on_bytes=size if keeps and not kept else 0,
                gradient_bytes=way.popped.gradient.sent,
                gradient_storage_bytes=way.popped.gradient.storage,
            )
        )
        arriving[way.target] += 0 if keeps or kept else size
    passing = 0  # the same of the cell's input
    for i, (cell, following) in enumerate(zip_longest(footprints, footprints[1:])):
        wanted = following.kept_inputs if following else {}
        handed_on = sum(size for leaf, size in wanted.items() if leaf not in cell.kept_outputs)
        activations = cell.activation_bytes + handed_on
        most = max(cell.forward_peak + passing + arriving[i], cell.backward_peak)
        owned.append(
            Owned(
                activation_bytes=activations,
                boundary_bytes=cell.boundary_bytes,
                workspace_bytes=max(0, most - activations),
                kept_input_bytes=sum(cell.kept_inputs.values()),
                handed_on_bytes=handed_on,
                skips=tuple(skips[i]),
            )
        )
        passing = sum(size for leaf, size in cell.outputs.items() if leaf not in {*wanted, *cell.kept_outputs})
    return owned


def _ways(cells: Sequence[Alone], footprints: Sequence[Footprint]) -> Iterator[_Way]:
    """Of every tensor that skips cells, the nearest target of a source first."""
    sources = {key: (i, place) for i, cell in enumerate(cells) for place, key in enumerate(cell.stashes)}
    for target, cell in enumerate(cells):
        for popped, key in zip(footprints[target].pops, cell.pops, strict=True):
            source, place = sources[key]
            stashed = footprints[source].stashes[place]
            if stashed is not None and popped is not None:
                yield _Way(source, target, stashed, popped)


def _kept_elsewhere(ways: Iterator[_Way], footprints: Sequence[Footprint]) -> Iterator[tuple[_Way, bool]]:
    """Whether a graph of the source's stage keeps the tensor, be it not that of the cell that pops it."""
    taken: set[tuple[int, int]] = set()  # storages that a nearer cell keeps
    for way in ways:
        before = footprints[way.source - 1].kept_outputs if way.source else frozenset()
        after = footprints[way.source + 1].kept_inputs if way.source + 1 < len(footprints) else {}
        storage = way.source, way.stashed.address
        kept = way.stashed.kept or bool(way.stashed.inputs & before) or any(o in after for o in way.stashed.outputs)
        yield way, kept or storage in taken
        if way.popped.kept:
            taken.add(storage)
