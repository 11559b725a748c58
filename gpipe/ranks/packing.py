"""What stages send each other as a header and plain bytes, and back.

A message arrives as it was sent: strides, alignment and overlaps of its tensors stay, since kernels choose their order
of summation by them. Of tensors that share memory the window that holds them is sent once, or, where that is less,
their elements.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpipe.boundary import Boundary
from gpipe.memory import alignment, by_storage, elements_alone, window

Message = Boundary | Sequence[Any]


class _Value(NamedTuple):
    """A leaf that goes in the header: no tensor, or one that is no plain memory."""

    value: Any


class _Empty(NamedTuple):
    """A tensor without elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    moves: bool


class _Placed(NamedTuple):
    """A tensor in a piece of memory."""

    piece: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements from the start of the piece


class _Piece(NamedTuple):
    """A piece of memory that tensors share."""

    dtype: torch.dtype
    shift: int  # elements between an aligned address and its start
    size: int  # elements
    dense: bool  # sent tensor by tensor, not as a whole
    moves: bool  # from the sending stage's device to the receiving one's


class _Header(NamedTuple):
    frame: Any  # of a Boundary what it has beside leaves; None for a sequence
    leaves: list[_Value | _Empty | _Placed]
    pieces: list[_Piece]


def pack(message: Message, device: torch.device) -> tuple[bytes, list[Tensor]]:
    """A message as a header, and tensors of bytes that share memory with it where they can.

    Args:
        message: A boundary, or leaves: tensors and any other values that can be pickled.
        device: Where the sending stage lives; its tensors will live on the receiving stage's device, others on the CPU.

    Raises:
        TypeError: A value cannot be pickled.
    """
    leaves: Sequence[Any] = message.leaves if isinstance(message, Boundary) else message
    frame = (message.needs_grad, message.places, message.spec) if isinstance(message, Boundary) else None
    pieces: list[_Piece] = []
    buffers: list[Tensor] = []
    placed: dict[int, _Placed] = {}
    for tensors in by_storage(leaves):
        piece, parts = _piece(tensors, device)
        first, _ = window(tensors)
        for t in tensors:
            offset = int(t.storage_offset() - first.storage_offset())
            placed[id(t)] = _Placed(len(pieces), tuple(t.shape), t.stride(), offset)
        pieces.append(piece)
        buffers += [part.view(torch.uint8) for part in parts]
    described = [placed.get(id(leaf)) or _described(leaf, device) for leaf in leaves]
    return _pickled(_Header(frame, described, pieces)), buffers


def _piece(tensors: Sequence[Tensor], device: torch.device) -> tuple[_Piece, list[Tensor]]:
    """The memory of tensors that share a storage, and what of it is sent."""
    first, size = window(tensors)
    alone = elements_alone(tensors, size)
    shift = first.data_ptr() % alignment(first.device) // first.element_size()
    piece = _Piece(first.dtype, shift, size, alone is not None, first.device == device)
    if alone is not None:
        return piece, [t.contiguous().view(-1) for t in alone]
    return piece, [first.as_strided((size,), (1,), first.storage_offset())]


def _described(leaf: Any, device: torch.device) -> _Value | _Empty:
    if isinstance(leaf, Tensor) and type(leaf) is Tensor and leaf.layout == torch.strided and leaf.numel() == 0:
        return _Empty(leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device == device)
    return _Value(leaf)


def _pickled(header: _Header) -> bytes:
    try:
        return pickle.dumps(header, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        values = [type(leaf.value).__qualname__ for leaf in header.leaves if isinstance(leaf, _Value)]
        raise TypeError(
            "what a stage hands to a stage on another rank must be tensors and values that can be pickled, got "
            f"{', '.join(values) or 'an output'} whose pickling failed ({error}): return tensors and plain values"
        ) from error


@dataclass
class Arrival:
    """A message on its way in.

    Args:
        header: As packed.
        device: Where the receiving stage lives.
        direct: Whether what is to live there comes there, not first to the CPU.
    """

    header: bytes
    device: torch.device
    direct: bool = False

    def __post_init__(self) -> None:
        self._header: _Header = pickle.loads(self.header)
        self._memory: list[Tensor] = []
        self._dense: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self.buffers: list[Tensor] = []
        """Tensors of bytes, to be filled with what was packed, in order."""
        for number, piece in enumerate(self._header.pieces):
            at = self.device if self.direct and piece.moves else torch.device("cpu")
            pinned = self.device.type != "cpu" and at.type == "cpu"
            memory = torch.empty(piece.shift + piece.size, dtype=piece.dtype, device=at, pin_memory=pinned)
            self._memory.append(memory)
            if not piece.dense:
                self.buffers.append(memory[piece.shift :].view(torch.uint8))
                continue
            for leaf in self._header.leaves:
                if isinstance(leaf, _Placed) and leaf.piece == number and _key(leaf) not in self._dense:
                    part = torch.empty(leaf.shape, dtype=piece.dtype, device=at)
                    self._dense[_key(leaf)] = part
                    self.buffers.append(part.view(-1).view(torch.uint8))

    def message(self) -> Message:
        """What was packed, once the buffers are filled; on an accelerator in order with its current stream."""
        for (number, offset, shape, stride), part in self._dense.items():
            shift = self._header.pieces[number].shift
            self._memory[number].as_strided(shape, stride, shift + offset).copy_(part)
        memory = [self._home(m, p.moves) for m, p in zip(self._memory, self._header.pieces, strict=True)]
        leaves = [self._leaf(leaf, memory) for leaf in self._header.leaves]
        return leaves if self._header.frame is None else Boundary(tuple(leaves), *self._header.frame)

    def _home(self, tensor: Tensor, moves: bool) -> Tensor:
        return tensor.to(self.device, non_blocking=True) if moves and self.device.type != "cpu" else tensor

    def _leaf(self, leaf: _Value | _Empty | _Placed, memory: Sequence[Tensor]) -> Any:
        if isinstance(leaf, _Value):
            return leaf.value
        if isinstance(leaf, _Empty):
            device = self.device if leaf.moves else "cpu"
            return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=device)
        shift = self._header.pieces[leaf.piece].shift
        return memory[leaf.piece].as_strided(leaf.shape, leaf.stride, shift + leaf.offset)


def _key(leaf: _Placed) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
    return leaf.piece, leaf.offset, leaf.shape, leaf.stride
