"""Tensors as pieces of memory: copies that compute the same bits, and pieces that overlap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 64  # bytes; allocators start at multiples of it


def copied(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Every tensor of ``leaves`` in new memory, all else as it is.

    Kernels choose their order of summation by strides and alignment. These stay, and so do overlaps: computing with the
    copies gives the same bits as computing with the originals.
    """
    copies: dict[int, Tensor] = {}
    for tensors in by_storage(leaves):
        copies.update(zip(map(id, tensors), _copied_window(tensors), strict=True))
    return tuple(copies[id(x)] if id(x) in copies else x.clone() if isinstance(x, Tensor) else x for x in leaves)


def overlapping(leaves: Iterable[Any]) -> bool:
    """Whether two tensors of ``leaves`` hold the same element."""
    return any(_most_holders(tensors) > 1 for tensors in by_storage(leaves) if len(tensors) > 1)


def version(tensor: Tensor) -> int:
    """A number that changes when ``tensor`` is written to."""
    return -1 if tensor.is_inference() else tensor._version


def address(tensor: Tensor) -> int:
    """Where the values of ``tensor`` stand, 0 if it is not plain memory."""
    return tensor.data_ptr() if _is_plain(tensor) else 0


def by_storage(leaves: Iterable[Any]) -> list[list[Tensor]]:
    """The tensors that are plain strided memory, grouped by storage and type."""
    groups: dict[Any, list[Tensor]] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor) and _is_plain(leaf):
            groups.setdefault((leaf.untyped_storage().data_ptr(), leaf.dtype), []).append(leaf)
    return list(groups.values())


def _is_plain(tensor: Tensor) -> bool:
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


def _copied_window(tensors: Sequence[Tensor]) -> list[Tensor]:
    if len(tensors) == 1 and tensors[0].is_contiguous() and not tensors[0].data_ptr() % ALIGNMENT:
        copy = tensors[0].clone(memory_format=torch.contiguous_format)
        if copy.stride() == tensors[0].stride():  # those of dimensions of one row may differ
            return [copy]
    first, size = window(tensors)
    start = first.storage_offset()
    shift = first.data_ptr() % ALIGNMENT // first.element_size()
    memory = first.new_empty(shift + size)
    memory[shift:].copy_(first.as_strided((size,), (1,), start))
    return [memory.as_strided(t.shape, t.stride(), shift + t.storage_offset() - start) for t in tensors]


def _most_holders(tensors: Sequence[Tensor]) -> int:
    """The largest number of tensors that hold one and the same element."""
    first, size = window(tensors)
    elements = torch.arange(size)
    held = [elements.as_strided(t.shape, t.stride(), t.storage_offset() - first.storage_offset()) for t in tensors]
    return int(torch.cat([torch.unique(h) for h in held]).bincount().max())
