"""What a stage and a link cost, as the simulator takes it: checked numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from numbers import Integral, Real
from statistics import median
from typing import Any

from gpipe.actions import Kind
from gpipe.partitioning.cost import CellCost
from gpipe.timeline import Timeline

Link = tuple[float, float]
"""Latency in seconds, bandwidth in bytes per second."""


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

    def __post_init__(self) -> None:
        for field in fields(self):
            check = seconds if field.name.endswith("seconds") else whole_bytes
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

    @classmethod
    def of_cells(cls, cells: Sequence[CellCost], weight_share: float = 0.5) -> StageCost:
        """The cost of a stage from those of its cells, as ``profile`` and ``estimate`` give them.

        Args:
            cells: Of one stage, in order.
            weight_share: The part of a backward that the weights' gradients take, 0 to 1; half in large products.
        """
        backward = sum(cell.backward_seconds for cell in cells)
        activations = sum(cell.activation_bytes for cell in cells) - cells[-1].handed_on_bytes
        so_far = accumulate(cell.activation_bytes for cell in cells)
        running = max(before + cell.workspace_bytes for before, cell in zip(so_far, cells, strict=True))
        return cls(
            forward_seconds=sum(cell.forward_seconds for cell in cells),
            input_gradient_seconds=backward * (1 - weight_share),
            weight_gradient_seconds=backward * weight_share,
            activation_bytes=activations,
            boundary_bytes=cells[-1].boundary_bytes,
            parameter_bytes=sum(cell.parameter_bytes for cell in cells),
            workspace_bytes=max(0, running - activations),
        )


def divided_costs(cells: Sequence[CellCost], balance: Sequence[int], weight_share: float = 0.5) -> list[StageCost]:
    """One cost for every stage of a division of cells.

    Args:
        cells: Their costs, in order.
        balance: Number of cells of every stage.
        weight_share: The part of a backward that the weights' gradients take.
    """
    ends = [0, *accumulate(balance)]
    return [StageCost.of_cells(cells[first:end], weight_share) for first, end in pairwise(ends)]


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
