"""What a process says of itself besides the loss."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch


def peak_memory(devices: Iterable[torch.device]) -> dict[str, int]:
    """The most bytes held so far: by the process, and on each accelerator among ``devices``."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for device in devices:
        if device.type != "cpu":
            peaks[str(device).replace(":", "_")] = torch.accelerator.max_memory_allocated(device)
    return peaks
