"""Tensors straight from accelerator to accelerator, where the ends of a route have one each.

What carries them, NCCL or what other vendors have in its place, knows no tags: what two ranks exchange matches in the
order in which either issues it. Each route has a communicator of its own; all that a rank issues, on whichever of them,
comes from the one thread that runs its stages, in the order of ``message_order.py``.

Whatever is issued waits on the accelerator, not the host. A send waits for what computes it, and nothing waits for it.
A receive is issued ahead, on a stream that computes nothing, and waits for its sender alone; the computation waits for
it where the message is used.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpipe import lanes


@dataclass(frozen=True)
class Direct:
    """What carries the tensors of one route that live on its ends' devices.

    Attributes:
        group: Its two ranks alone.
        source, target: Ranks of the world.
        intact: Whether, when they greeted, what arrived here was what was sent.
    """

    group: dist.ProcessGroup
    source: int
    target: int
    intact: bool = True

    def send(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """Begin to send what the current stream computes; the tensors are to be kept until the works are complete."""
        return _begun([dist.isend(t, self.target, self.group) for t in tensors])

    def receive(self, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """Begin to receive, into memory of the current stream; whoever waits for a work has its stream wait."""
        return _begun([dist.irecv(t, self.source, self.group) for t in tensors])

    def greet(self, rank: int, device: torch.device) -> bool:
        """Pass a pattern, which makes the communicator: later it would be made beside kernels that wait for others.

        Gives whether it is here as it was sent.
        """
        sent = lanes.pattern()
        here = sent.to(device) if rank == self.source else torch.zeros_like(sent, device=device)
        for work in (self.send if rank == self.source else self.receive)([here]):
            work.wait()
        return torch.equal(here.cpu(), sent)

    def check(self) -> None:
        """Raise a RuntimeError if something else arrived than was sent."""
        if not self.intact:
            raise RuntimeError(lanes.lost(f"the accelerator of rank {self.source}", f"that of rank {self.target}"))


def _begun(works: Sequence[dist.Work | None]) -> list[dist.Work]:
    begun = [work for work in works if work is not None]
    assert len(begun) == len(works)
    return begun


class UnderWay:
    """What an accelerator still sends or receives: its memory is kept until that is done."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Sequence[dist.Work], Sequence[Tensor]]] = {}

    def keep(self, works: Sequence[dist.Work], tensors: Sequence[Tensor]) -> None:
        """Keep ``tensors`` until ``works`` are complete, or released."""
        self._kept[id(works)] = works, tensors

    def release(self, works: Sequence[dist.Work]) -> None:
        """Let go of what was kept for ``works``: somebody else keeps it."""
        self._kept.pop(id(works), None)

    def count(self) -> int:
        """How many are not complete yet; the memory of all others is let go. The host does not wait."""
        done = [key for key, (works, _) in self._kept.items() if all(map(_over, works))]
        for key in done:
            del self._kept[key]
        return len(self._kept)


def _over(work: dist.Work) -> bool:
    try:
        return bool(work.is_completed())
    except RuntimeError:  # aborted
        return True


def backend(device: torch.device, group: dist.ProcessGroup | None = None) -> str:
    """What carries tensors of ``device`` between the ranks of ``group``, or the world: "nccl", say; "" if nothing."""
    carriers = dict(pair.split(":", 1) for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    return carriers.get(device.type, "")


def accelerator(device: torch.device) -> str:
    """What carries this rank's tensors to other accelerators, and what tells its own from all others of the world.

    "" if they go through the host: on a CPU, and in a world that has gloo alone.
    """
    carrier = "" if device.type == "cpu" else backend(device)
    if carrier in ("", "gloo"):
        return ""
    return f"{carrier} {socket.gethostname()} {_identity(device)}"


def _identity(device: torch.device) -> str:
    """The device's own name, where it has one: processes may each see another as their first."""
    properties: Any = getattr(torch.get_device_module(device), "get_device_properties", None)
    found = getattr(properties(device), "uuid", None) if properties else None
    return str(device) if found is None else str(found)


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
    carriers = [end.split()[0] for end in ends]
    if carriers[0] != carriers[1]:
        return None
    group = dist.new_group([source, target], backend=carriers[0])
    if rank not in (source, target):
        return None
    assert isinstance(group, dist.ProcessGroup)
    carrier = Direct(group, source, target)
    return replace(carrier, intact=carrier.greet(rank, device))
