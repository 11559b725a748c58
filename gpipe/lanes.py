"""Copies to and between accelerators, on streams of their own.

On the devices' current streams torch's copy is a barrier of both: what is sent waits for all that the receiver was
given so far, and all that the receiver is given next waits for what is sent. A host runs ahead of its device, so that
would join micro-batches that have nothing to do with each other. On two idle streams the copy waits for what it copies
alone, and the receiver for the copy where it uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpipe.context import current
from gpipe.memory import copied, is_plain


class Crossing(NamedTuple):
    """Values on their way from one accelerator to another.

    Attributes:
        values: The copies, and what is no tensor of the source.
        arrived: Happens when the copies are there.
        target: Where.
    """

    values: list[Any]
    arrived: torch.Event
    target: torch.device

    def landed(self) -> list[Any]:
        """The values, for use on the target's current stream, which waits for them; the host does not."""
        stream = torch.accelerator.current_stream(self.target)
        stream.wait_event(self.arrived)
        _record(self.values, self.target, stream)
        return self.values


def between(source: torch.device, target: torch.device) -> bool:
    """Whether these are two accelerators."""
    return source != target and not {"cpu", "meta"} & {source.type, target.type}


def cross(values: Sequence[Any], source: torch.device, target: torch.device) -> Crossing:
    """Start to copy the tensors of ``source`` that its current stream makes; strides, alignment and overlaps stay.

    Those that are no plain memory (sparse ones, subclasses) are copied on the current streams.

    Args:
        values: Tensors and other values; those that are elsewhere stay there.
        source: An accelerator.
        target: Another.

    Raises:
        torch.OutOfMemoryError: ``target`` has no room.
    """
    out, into = _lane(source, target)
    out.wait_event(torch.accelerator.current_stream(source).record_event())
    _record(values, source, out)
    with current([out, into]):
        there = _replaced(values, source, target, is_plain)
        arrived = into.record_event()
    return Crossing(moved(there, source, target), arrived, target)


def moved(values: Sequence[Any], source: torch.device, target: torch.device) -> list[Any]:
    """``values`` with copies on ``target`` of the tensors of ``source``, in order with both current streams."""
    return _replaced(values, source, target, lambda tensor: True)


def _replaced(
    values: Sequence[Any], source: torch.device, target: torch.device, which: Callable[[Tensor], bool]
) -> list[Any]:
    there = list(values)
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.device == source and which(v)]
    for i, copy in zip(places, copied([values[i] for i in places], target), strict=True):
        there[i] = copy
    return there


def entered(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, for use on its current stream.

    What comes from the CPU does not queue behind the accelerator's work. The host waits for it, so the caller may write
    to ``tensor`` again at once, in pinned memory too.
    """
    stream = (
        _entrance(device) if tensor.device.type == "cpu" and is_plain(tensor) and not tensor.requires_grad else None
    )
    if stream is None:
        return tensor.to(device)
    with current([stream]):
        there = tensor.to(device, non_blocking=tensor.is_pinned())
        arrived = stream.record_event()
    if not arrived.query():
        arrived.synchronize()
    there.record_stream(torch.accelerator.current_stream(device))
    return there


@cache
def _entrance(device: torch.device) -> torch.Stream | None:
    """The stream of all copies from the CPU to an accelerator; None for other devices, and where it has none (MPS)."""
    if device.type in ("cpu", "meta"):
        return None
    try:
        return torch.Stream(device)
    except (RuntimeError, NotImplementedError):
        return None


def brought(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on ``device``, for use on its current stream; all are on their way before the first is waited for."""
    coming = [
        cross([tensor], tensor.device, device) if between(tensor.device, device) else tensor.to(device)
        for tensor in tensors
    ]
    return [tensor.landed()[0] if isinstance(tensor, Crossing) else tensor for tensor in coming]


def check(pairs: Iterable[tuple[torch.device, torch.device]]) -> None:
    """Send a pattern from the first to the second of every pair, once a process where both are accelerators.

    Some machines lose what goes from device to device and say nothing: with an IOMMU, or access control (ACS) of
    PCI Express on, zeros arrive.

    Raises:
        RuntimeError: Something else arrived.
    """
    for source, target in dict.fromkeys(pairs):
        if between(source, target):
            _check(source, target)


@cache
def _check(source: torch.device, target: torch.device) -> None:
    sent = pattern()
    (there,) = cross([sent.to(source)], source, target).landed()
    if not torch.equal(there.cpu(), sent):
        raise RuntimeError(lost(str(source), str(target)))


def pattern() -> Tensor:
    """What is sent to see whether it arrives: 64 KiB, on the CPU."""
    return torch.arange(1 << 14, dtype=torch.int32, device="cpu") ^ 0x5A5A5A5A


def lost(source: str, target: str) -> str:
    """What is to be said, and done, where a pattern did not arrive."""
    return (
        f"what {source} sends to {target} does not arrive as it was sent, and nothing would tell in training: turn off "
        "the IOMMU and ACS of PCI Express on this machine, or peer-to-peer access where the vendor advises that "
        "(NCCL_P2P_DISABLE=1 for NCCL), or do not give both devices to one pipe"
    )


@cache
def _lane(source: torch.device, target: torch.device) -> tuple[torch.Stream, torch.Stream]:
    """The streams of all copies from one accelerator to another, on both."""
    return torch.Stream(source), torch.Stream(target)


def _record(values: Sequence[Any], device: torch.device, stream: torch.Stream) -> None:
    """Keep the memory of the plain tensors on ``device`` until ``stream`` has used it."""
    for value in values:
        if isinstance(value, Tensor) and value.device == device and is_plain(value):
            value.record_stream(stream)
