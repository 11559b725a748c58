"""Tensors straight from accelerator to accelerator, over NCCL, where the ends of a route have one each.

NCCL's messages carry no tags: what two ranks exchange matches in the order in which either issues it. Each route has
a communicator of its own, and its ends issue what belongs to its messages in the order of their slots, from one thread
each. Neither opposite directions nor two routes of the same ranks wait for each other.

A send is issued when what it sends has been computed, a receive when the message's slot has come: what waits on the
accelerators waits for the other end's thread, never for computation.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Direct:
    """What carries the tensors of one route that live on its ends' devices.

    Attributes:
        group: Its two ranks alone.
        source, target: Ranks of the world.
    """

    group: dist.ProcessGroup
    source: int
    target: int

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Send; on an accelerator its current stream waits until they have gone, elsewhere the caller."""
        _ended([dist.isend(t, self.target, self.group) for t in tensors])

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Receive; on an accelerator its current stream waits until they have come, elsewhere the caller."""
        _ended([dist.irecv(t, self.source, self.group) for t in tensors])

    def greet(self, rank: int, device: torch.device) -> None:
        """Pass a byte, which makes the communicator: later it would be made beside kernels that wait for others."""
        byte = [torch.zeros(1, dtype=torch.uint8, device=device)]
        (self.send if rank == self.source else self.receive)(byte)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def abort(self) -> None:
        """End what waits for a rank that is gone."""
        self.group.abort()


def _ended(works: Sequence[dist.Work | None]) -> None:
    for work in works:
        assert work is not None
        work.wait()


def accelerator(device: torch.device) -> str:
    """What tells the accelerator of this rank from all others of the world; "" if NCCL is not to be used with it."""
    if device.type != "cuda" or "cuda:nccl" not in dist.get_backend_config():
        return ""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"


def direct(source: int, target: int, accelerators: Sequence[str], rank: int, device: torch.device) -> Direct | None:
    """What carries a route's tensors, if both ranks have an accelerator of their own.

    Every rank calls it, for all routes in the same order.

    Args:
        source: Where the route begins.
        target: Where it ends.
        accelerators: What ``accelerator`` gave on every rank.
        rank: This rank; others than the two ends get None.
        device: Where this rank's stages live.
    """
    ends = accelerators[source], accelerators[target]
    if source == target or not all(ends) or ends[0] == ends[1]:
        return None
    group = dist.new_group([source, target], backend="nccl")
    if rank not in (source, target):
        return None
    assert isinstance(group, dist.ProcessGroup)
    carrier = Direct(group, source, target)
    carrier.greet(rank, device)
    return carrier
