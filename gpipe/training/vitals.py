"""What a process says of itself besides the loss."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable

import torch

from gpipe.partitioning.live import allocator_tells


def peak_memory(devices: Iterable[torch.device]) -> dict[str, int]:
    """The most bytes held so far: by the process, and on each accelerator among ``devices`` whose allocator tells."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for device in devices:
        if allocator_tells(device):
            peaks[str(device).replace(":", "_")] = torch.accelerator.max_memory_allocated(device)
    return peaks
