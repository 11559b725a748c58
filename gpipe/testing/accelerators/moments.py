"""Simulated time as seconds of the monotonic clock, which all processes of a machine share."""

from __future__ import annotations

import torch

from gpipe.testing.accelerators import build


def free_at(stream: torch.Stream) -> float:
    """When all that a stream has now will have run."""
    return float(build.native().free_at(stream.device_index, stream.stream_id))


def hold(stream: torch.Stream, until: float) -> None:
    """Let a stream do nothing before that time."""
    build.native().hold(stream.device_index, stream.stream_id, until)
