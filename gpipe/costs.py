"""What a stage and a link cost, as the simulator takes it: checked numbers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from numbers import Integral, Real
from statistics import median
from typing import Any, NamedTuple

from gpipe.actions import Kind
from gpipe.partitioning.cost import CellCost
from gpipe.timeline import Timeline

Link = tuple[float, float]
"""Latency in seconds, bandwidth in bytes per second."""


class SkipIn(NamedTuple):
    """What one stage hands another beside the chain's boundaries, in bytes.

    Attributes:
        source: The stage it comes from.
        value_bytes: One micro-batch.
        kept_bytes: Of that, what autograd keeps.
        gradient_bytes: What its gradient takes where it comes from.
    """

    source: int
    value_bytes: int
    kept_bytes: int
    gradient_bytes: int


@dataclass(frozen=True)
class StageCost:
    """What one micro-batch costs on a stage. B takes I + W, a recompute as long as a forward.

    Attributes:
        forward_seconds: Of F and R.
        input_gradient_seconds: Of I.
        weight_gradient_seconds: Of W.
        activation_bytes: What autograd keeps from F (or R) to B (or W), the stage's input left out.
        boundary_bytes: The stage's output; its gradient is as large.
        parameter_bytes: Of all the stage's parameters.
        workspace_bytes: What comes and goes while an action runs.
        skips: What is popped here and was stashed by stages before, one entry for every such stage: its number, the
            bytes of the values, those autograd keeps of them, those of their gradients; see ``SkipIn``.

    Raises:
        TypeError, ValueError: A field is no number, negative, or not finite; bytes are no whole number.
    """

    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    activation_bytes: int = 0
    boundary_bytes: int = 0
    parameter_bytes: int = 0
    workspace_bytes: int = 0
    skips: tuple[SkipIn, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skips", tuple(map(_skip, self.skips)))
        for field in fields(self):
            if field.name == "skips":
                continue
            check = seconds if field.name.endswith("seconds") else whole_bytes
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

    @classmethod
    def of_cells(cls, cells: Sequence[CellCost], weight_share: float = 0.5) -> StageCost:
        """The cost of a stage from those of its cells, as ``profile`` and ``estimate`` give them.

        Args:
            cells: Of one stage, in order.
            weight_share: The part of a backward that the weights' gradients take, 0 to 1; half in large products.
        """
        return divided_costs(cells, [len(cells)], weight_share)[0]


def divided_costs(cells: Sequence[CellCost], balance: Sequence[int], weight_share: float = 0.5) -> list[StageCost]:
    """One cost for every stage of a division of cells.

    Args:
        cells: Their costs, in order.
        balance: Number of cells of every stage.
        weight_share: The part of a backward that the weights' gradients take.
    """
    ends = [0, *accumulate(balance)]
    skips = _Skips.of(cells, ends)
    found = []
    for k, (first, end) in enumerate(pairwise(ends)):
        own = cells[first:end]
        backward = sum(cell.backward_seconds for cell in own)
        activations = sum(cell.activation_bytes for cell in own) - own[-1].handed_on_bytes
        so_far = accumulate(cell.activation_bytes for cell in own)
        running = max(
            map(sum, zip(so_far, (cell.workspace_bytes for cell in own), skips.passing[first:], strict=False))
        )
        found.append(
            StageCost(
                forward_seconds=sum(cell.forward_seconds for cell in own),
                input_gradient_seconds=backward * (1 - weight_share),
                weight_gradient_seconds=backward * weight_share,
                activation_bytes=activations + skips.handed_on[k],
                boundary_bytes=own[-1].boundary_bytes,
                parameter_bytes=sum(cell.parameter_bytes for cell in own),
                workspace_bytes=max(0, running - activations),
                skips=tuple(skip for (target, _), skip in sorted(skips.brought.items()) if target == k),
            )
        )
    return found


@dataclass(frozen=True)
class _Skips:
    """What skips cells, for stages that end at given cells.

    Attributes:
        passing: Per cell what waits while it runs, of values that this or a later cell of its stage pops.
        handed_on: Per stage what it stashes that only its own cells which pop it keep.
        brought: What comes from one stage to another, by (target, source).
    """

    passing: list[int]
    handed_on: list[int]
    brought: dict[tuple[int, int], SkipIn]

    @classmethod
    def of(cls, cells: Sequence[CellCost], ends: Sequence[int]) -> _Skips:
        """Those of ``cells``; ``ends`` are 0 and the ends of the stages. What leaves the last stage is left out."""
        changes = [0] * (len(cells) + 1)
        found = cls([], [0] * (len(ends) - 1), {})
        for i, cell in enumerate(cells):
            for skip in cell.skips:
                target = i + skip.cells_on
                here, there = (bisect_right(ends, which) - 1 for which in (i, target))
                if target >= len(cells):
                    continue
                changes[max(i + 1, ends[there])] += skip.passing
                changes[target] -= skip.passing
                if here == there:
                    found.handed_on[here] += skip.handed_on_bytes
                else:
                    changes[i] -= skip.value_bytes  # its gradient, which the cell's workspace has, comes from elsewhere
                    changes[i + 1] += skip.value_bytes
                    _, *before = found.brought.get((there, here), SkipIn(here, 0, 0, 0))
                    more = skip.value_bytes, skip.kept, skip.gradient
                    found.brought[there, here] = SkipIn(here, *map(sum, zip(before, more, strict=True)))
        found.passing.extend(accumulate(changes[:-1]))
        return found


def measured_costs(timeline: Timeline) -> list[StageCost]:
    """The seconds of every stage in a recorded mini-batch: medians over its micro-batches; bytes are left out.

    Where backwards ran whole, all of their time counts as that of the input's gradient.
    """
    found: dict[tuple[int, Kind], list[float]] = {}
    for spans in timeline.workers:
        for (stage, kind, _), start, end in spans:
            found.setdefault((stage, Kind.FORWARD if kind == Kind.RECOMPUTE else kind), []).append(end - start)
    middle = {key: median(values) for key, values in found.items()}
    return [
        StageCost(
            forward_seconds=middle[stage, Kind.FORWARD],
            input_gradient_seconds=middle.get((stage, Kind.INPUT_GRADIENT), middle.get((stage, Kind.BACKWARD), 0.0)),
            weight_gradient_seconds=middle.get((stage, Kind.WEIGHT_GRADIENT), 0.0),
        )
        for stage in sorted({stage for stage, _ in found})
    ]


def _skip(given: Any) -> SkipIn:
    if not isinstance(given, Sequence) or len(given) != len(SkipIn._fields):
        raise TypeError(f"skips must hold ({', '.join(SkipIn._fields)}) each, got {given!r}")
    return SkipIn(*(whole_bytes(f"skips: {name}", each) for name, each in zip(SkipIn._fields, given, strict=True)))


def seconds(name: str, value: Any) -> float:
    """``value`` as a finite float of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return float(value)


def whole_bytes(name: str, value: Any) -> int:
    """``value`` as an int from 0 to 2**62."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if not 0 <= int(value) < 2**62:
        raise ValueError(f"{name} must be from 0 to 2**62, got {value!r}")
    return int(value)


def stage_costs(costs: StageCost | Sequence[StageCost], stages: int) -> list[StageCost]:
    """One cost for every stage.

    Raises:
        TypeError, ValueError: Something is no ``StageCost``, or there are not as many as stages.
    """
    given = [costs] * stages if isinstance(costs, StageCost) else list(costs)
    if wrong := next((cost for cost in given if not isinstance(cost, StageCost)), None):
        raise TypeError(f"costs must be a StageCost, or one per stage, got {type(wrong).__name__} {wrong!r}")
    if len(given) != stages:
        raise ValueError(f"costs gives {len(given)} for {stages} stages: give one StageCost per stage, or one for all")
    for k, cost in enumerate(given):
        if late := [skip.source for skip in cost.skips if skip.source >= k]:
            raise ValueError(
                f"costs: stage {k} has skips from stage {late[0]}, expected ones from stages before it: give one "
                "StageCost per stage, as divided_costs does"
            )
    return given


def stage_links(links: Link | Sequence[Link] | None, stages: int) -> list[Link] | None:
    """One link for every two neighbouring stages; None if messages take no time.

    Raises:
        TypeError, ValueError: A link is no pair of sensible numbers, or there are not K - 1.
    """
    if links is None:
        return None
    alike = len(links) == 2 and all(isinstance(part, Real) for part in links)
    given: list[Any] = [links] * max(0, stages - 1) if alike else list(links)
    if len(given) != max(0, stages - 1):
        raise ValueError(
            f"links gives {len(given)} for {stages} stages: give (latency in seconds, bandwidth in bytes per second) "
            f"for all, or {max(0, stages - 1)} such pairs, one for every two neighbouring stages"
        )
    return [_link(pair) for pair in given]


def _link(pair: Any) -> Link:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"a link must be (latency in seconds, bandwidth in bytes per second), got {pair!r}")
    latency, bandwidth = pair
    if isinstance(bandwidth, bool) or not isinstance(bandwidth, Real):
        raise TypeError(f"a link's bandwidth must be a number of bytes per second, got {bandwidth!r}")
    if not float(bandwidth) > 0:
        raise ValueError(f"a link's bandwidth must be above 0 bytes per second, got {bandwidth!r}")
    return seconds("a link's latency", latency), float(bandwidth)
