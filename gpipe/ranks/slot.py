"""The slot that begins every message between ranks: of fixed size, so that its receiver can wait for it ahead.

It holds numbers, and behind them, where they fit, the header, sent if it differs from the route's last, and the bytes
of the tensors. Tensors that do not fit follow.

As most messages are laid out as the one before, the receiver waits ahead for tensors of the same sizes too: they travel
at once, not only when it has read the slot, which would take the link's latency twice more. Every slot is therefore
followed by as many messages as the route's last message had tensors outside its slot: tensors, or, where the layout is
another, a byte each, since gloo lets a message be shorter than what waits for it. The tensors of another layout then
follow as soon as the receiver is ready for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

STOP = -1
"""In place of a micro-batch: nothing more will come."""

_NUMBERS = 5 * 8  # bytes
_SIZE = 4096  # bytes

ROOM = _SIZE - _NUMBERS
"""Bytes behind the numbers."""


class Place(IntEnum):
    """Where the tensors of a message are."""

    SLOT = 0  # behind the header
    AWAITED = 1  # where the receiver waits ahead
    BEHIND = 2  # behind what it waits for ahead


class Slot(NamedTuple):
    """The numbers of a slot.

    Attributes:
        micro_batch: Whose message it is.
        size: Bytes of the header; 0 if it is the last one's.
        check: The header's checksum.
        number: Of tensors.
        place: Where they are.
    """

    micro_batch: int
    size: int = 0
    check: int = 0
    number: int = 0
    place: int = Place.SLOT

    def packed(self, inside: Sequence[Tensor] = ()) -> Tensor:
        """The slot as bytes, with bytes behind the numbers."""
        memory = room()
        memory[:_NUMBERS].view(torch.int64).copy_(torch.tensor(self, dtype=torch.int64, device="cpu"))
        end = _NUMBERS
        for part in inside:
            memory[end : end + len(part)] = part
            end += len(part)
        return memory

    @classmethod
    def read(cls, memory: Tensor) -> tuple[Slot, Tensor]:
        """The slot in these bytes, and what is behind the numbers."""
        return cls(*memory[:_NUMBERS].view(torch.int64).tolist()), memory[_NUMBERS:]


def room() -> Tensor:
    """Memory for a slot."""
    return torch.empty(_SIZE, dtype=torch.uint8, device="cpu")
