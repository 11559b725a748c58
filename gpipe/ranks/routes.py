"""One way from a rank to another, over gloo point-to-point messages; ``sending.py``, ``receiving.py`` are its ends.

A message is a slot (``slot.py``) and tensors of bytes. Those on an accelerator pass through pinned memory, or, where
they are laid out as the last message's, straight to the other rank's accelerator (``direct.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe.ranks.direct import Direct


class ConnectionLost(RuntimeError):
    """A rank can no longer be reached."""


@contextmanager
def reaching(whom: str) -> Iterator[None]:
    """Talk to ``whom`` inside; what torch raises of a lost one becomes a ``ConnectionLost``.

    Torch raises a RuntimeError then, as it also does, in kinds of their own, of this rank's device: those stay.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, ConnectionLost):
        raise
    except RuntimeError as error:
        raise ConnectionLost(f"{whom} cannot be reached: {error}") from error


@dataclass(frozen=True)
class Route:
    """One way from a rank to another.

    Attributes:
        source, target: Ranks of the world.
        tag: Tells its messages from those of other routes.
        group: What carries them.
        device: Where, at the end of this rank, what is sent lives and what is received is to live.
        direct: Carries tensors from device to device, if that can be.
    """

    source: int
    target: int
    tag: int
    group: dist.ProcessGroup
    device: torch.device
    direct: Direct | None = None

    def stream(self) -> torch.Stream | None:
        """A stream for copies beside the computation, on an accelerator."""
        return None if self.device.type == "cpu" else torch.Stream(self.device)

    def send(self, tensor: Tensor) -> dist.Work:
        """Begin to send."""
        with reaching(f"rank {self.target}"):
            work = dist.isend(tensor, self.target, self.group, self.tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor) -> dist.Work:
        """Begin to receive."""
        with reaching(f"rank {self.source}"):
            work = dist.irecv(tensor, self.source, self.group, self.tag)
        assert work is not None
        return work


Jobs = SimpleQueue[Callable[[], None] | None]


def jobs_thread(jobs: Jobs, name: str, device: torch.device) -> threading.Thread:
    """A thread that does one job after the other, until it gets None.

    ``device`` is its current one: it would otherwise open the first device too, which takes memory there.
    """
    thread = threading.Thread(target=_run_jobs, args=(jobs, device), name=name, daemon=True)
    thread.start()
    return thread


def _run_jobs(jobs: Jobs, device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    while (job := jobs.get()) is not None:
        job()
        del job
