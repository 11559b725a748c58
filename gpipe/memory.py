"""Tensors as pieces of memory: copies that compute the same bits, and pieces that overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def alignment(device: torch.device) -> int:
    """Bytes; allocators of ``device`` start at multiples of it, and kernels look no further."""
    return 64 if device.type == "cpu" else 512


def copied(leaves: Sequence[Any], device: torch.device | None = None) -> tuple[Any, ...]:
    """Every tensor of ``leaves`` in new memory, all else as it is.

    Kernels choose their order of summation by strides and alignment. These stay, and so do overlaps: computing with the
    copies gives the same bits as computing with the originals.

    Args:
        leaves: Tensors and other values.
        device: Where the copies are to be; None where each tensor is. The host waits for those to the CPU alone.
    """
    copies: dict[int, Tensor] = {}
    for tensors in by_storage(leaves):
        copies.update(zip(map(id, tensors), _copied_window(tensors, device or tensors[0].device), strict=True))
    return tuple(copies[id(x)] if id(x) in copies else _copied_alone(x, device) for x in leaves)


def _copied_alone(leaf: Any, device: torch.device | None) -> Any:
    """A leaf that is no plain memory."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if device in (None, leaf.device) else leaf.to(device, non_blocking=device.type != "cpu")


def overlapping(leaves: Iterable[Any]) -> bool:
    """Whether two tensors of ``leaves`` hold the same element."""
    return any(_most_holders(tensors) > 1 for tensors in by_storage(leaves) if len(tensors) > 1)


def version(tensor: Tensor) -> int:
    """A number that changes when ``tensor`` is written to."""
    return -1 if tensor.is_inference() else tensor._version


def address(tensor: Tensor) -> int:
    """Where the values of ``tensor`` stand, 0 if it is not plain memory."""
    return tensor.data_ptr() if is_plain(tensor) else 0


def by_storage(leaves: Iterable[Any]) -> list[list[Tensor]]:
    """The tensors that are plain strided memory, grouped by storage and type."""
    groups: dict[Any, list[Tensor]] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and is_plain(leaf):
            groups.setdefault((leaf.untyped_storage().data_ptr(), leaf.dtype), []).append(leaf)
    return list(groups.values())


def is_plain(tensor: Tensor) -> bool:
    """Whether ``tensor`` is its elements in strided memory, and nothing else."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def window(tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    """The tensor of one storage that starts first, and the number of elements from there to the end of the last."""
    first = min(tensors, key=Tensor.storage_offset)
    ends = [t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return first, int(max(ends)) + 1 - int(first.storage_offset())


def elements_alone(tensors: Sequence[Tensor], size: int) -> list[Tensor] | None:
    """The tensors of a window of ``size`` elements, each once, if to copy them is less than to copy all of it."""
    unique = list({(t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())
    apart = all(torch._debug_has_internal_overlap(t) != 1 for t in unique)  # 1: surely, and could not be written to
    return unique if apart and sum(t.numel() for t in unique) < size else None


def _copied_window(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    own, moves = tensors[0].device, tensors[0].device != device
    beside = moves and device.type != "cpu"
    if len(tensors) == 1 and tensors[0].is_contiguous() and not tensors[0].data_ptr() % alignment(own):
        dense = torch.contiguous_format
        copy = (
            tensors[0].to(device, non_blocking=beside, memory_format=dense)
            if moves
            else tensors[0].clone(memory_format=dense)
        )
        if copy.stride() == tensors[0].stride():  # those of dimensions of one row may differ
            return [copy]
    first, size = window(tensors)
    start = first.storage_offset()
    shift = first.data_ptr() % alignment(own) // first.element_size()
    memory = first.new_empty(shift + size, device=device)
    for t in (moves and elements_alone(tensors, size)) or [first.as_strided((size,), (1,), start)]:
        memory.as_strided(t.shape, t.stride(), shift + t.storage_offset() - start).copy_(t, non_blocking=beside)
    return [memory.as_strided(t.shape, t.stride(), shift + t.storage_offset() - start) for t in tensors]


def _most_holders(tensors: Sequence[Tensor]) -> int:
    """The largest number of tensors that hold one and the same element."""
    first, size = window(tensors)
    elements = torch.arange(size)
    held = [elements.as_strided(t.shape, t.stride(), t.storage_offset() - first.storage_offset()) for t in tensors]
    return int(torch.cat([torch.unique(h) for h in held]).bincount().max())
