"""What a stage and a link cost, as the simulator takes it: checked numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

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

    Raises:
        TypeError, ValueError: A field is no number, negative, or not finite; bytes are no whole number.
    """

    forward_seconds: float
    input_gradient_seconds: float
    weight_gradient_seconds: float
    activation_bytes: int = 0
    boundary_bytes: int = 0
    parameter_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            check = seconds if field.name.endswith("seconds") else whole_bytes
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))


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
