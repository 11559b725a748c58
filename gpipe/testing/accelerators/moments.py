"""Simulated time of streams as seconds of this machine's monotonic clock, which all processes share."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from gpipe.testing import accelerators


class Moments:
    """When streams of one device are done, and streams held until a given time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._reference = self._event(torch.Stream(device))  # an idle stream's: now
        self._origin = time.monotonic()
        self._holders: list[tuple[float, torch.Stream]] = []
        self._nothing: Tensor = torch.empty(1, dtype=torch.uint8, device=device)

    def free_at(self, stream: torch.Stream) -> float:
        """When all that the stream has now will have run."""
        return self._origin + self._reference.elapsed_time(self._event(stream)) / 1e3

    def spend(self, stream: torch.Stream, seconds: float) -> None:
        """Keep a stream busy."""
        if seconds > 0:
            with stream:
                accelerators.spend(self._nothing, seconds)

    def hold(self, stream: torch.Stream, until: float) -> None:
        """Let a stream do nothing before that time."""
        if until <= time.monotonic():
            return
        with self._lock:
            holder = next((h for h in self._holders if h[0] <= until), (0.0, torch.Stream(self.device)))
            if holder in self._holders:
                self._holders.remove(holder)
            busy_until, other = holder
            self.spend(other, until - max(busy_until, time.monotonic()))
            self._holders.append((until, other))
            stream.wait_event(self._event(other))

    def _event(self, stream: torch.Stream) -> torch.Event:
        event = torch.Event(self.device, enable_timing=True)
        event.record(stream)
        return event
