"""What stages send each other as a header and plain bytes, and back.

A message arrives as it was sent: strides, alignment and overlaps of its tensors stay, since kernels choose their order
of summation by them. Of tensors that share memory the window that holds them is sent once, or, where that is less,
their elements.
"""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import treespec_leaf

from gpipe.boundary import Boundary
from gpipe.memory import alignment, by_storage, elements_alone, window

Message = Boundary | Sequence[Any]

# The structure of a tree ends in torch's one leaf. Before torch 2.14 every message would make another, with a warning.
copyreg.pickle(type(treespec_leaf()), lambda _: (treespec_leaf, ()))


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
    """A message on its way in. Pieces that come directly, and others, may be filled by a thread each.

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
        self._memory: dict[int, Tensor] = {}
        self._parts: dict[int, dict[_Placed, Tensor]] = {}  # of a dense piece
        self.buffers = [b for n in self._pieces(directly=False) for b in self._room(n)]
        """Tensors of bytes on the CPU, to be filled with what was packed, in order."""

    @property
    def number(self) -> int:
        """Of all tensors that were packed."""
        return sum(len(self._keys(n)) if p.dense else 1 for n, p in enumerate(self._header.pieces))

    @property
    def has_direct(self) -> bool:
        """Whether there are tensors that come to the device."""
        return bool(self._pieces(directly=True))

    def direct_buffers(self) -> list[Tensor]:
        """Memory on the device, of its current stream, for the tensors that come there; to be called once.

        Raises:
            torch.OutOfMemoryError: It has no room.
        """
        return [b for n in self._pieces(directly=True) for b in self._room(n)]

    def move(self) -> None:
        """Begin to move what has come to the CPU to where it is to live, in order with the device's current stream."""
        for number in self._pieces(directly=False):
            self._spread(number)
            if self._header.pieces[number].moves and self.device.type != "cpu":
                self._memory[number] = self._memory[number].to(self.device, non_blocking=True)

    def message(self) -> Message:
        """What was packed, once all buffers are filled and moved; on an accelerator for its current stream."""
        for number in self._pieces(directly=True):
            self._spread(number)
        leaves = [self._leaf(leaf) for leaf in self._header.leaves]
        return leaves if self._header.frame is None else Boundary(tuple(leaves), *self._header.frame)

    def record(self, stream: torch.Stream) -> None:
        """Keep the memory on the device until ``stream`` has used it."""
        for tensor in (*self._memory.values(), *(part for parts in self._parts.values() for part in parts.values())):
            if tensor.device.type != "cpu":
                tensor.record_stream(stream)

    def _pieces(self, directly: bool) -> list[int]:
        """Numbers of the pieces: those that come to the device, or the others."""
        return [n for n in range(len(self._header.pieces)) if self._comes_directly(n) is directly]

    def _comes_directly(self, number: int) -> bool:
        return self.direct and self._header.pieces[number].moves

    def _room(self, number: int) -> list[Tensor]:
        """Memory for a piece; gives what of it is to be filled, as bytes."""
        piece = self._header.pieces[number]
        at = self.device if self._comes_directly(number) else torch.device("cpu")
        pinned = self.device.type != "cpu" and at.type == "cpu"
        memory = torch.empty(piece.shift + piece.size, dtype=piece.dtype, device=at, pin_memory=pinned)
        self._memory[number] = memory
        if not piece.dense:
            return [memory[piece.shift :].view(torch.uint8)]
        parts = {key: torch.empty(key.shape, dtype=piece.dtype, device=at) for key in self._keys(number)}
        self._parts[number] = parts
        return [part.view(-1).view(torch.uint8) for part in parts.values()]

    def _keys(self, number: int) -> list[_Placed]:
        """The tensors of a dense piece, each once."""
        return list(
            dict.fromkeys(leaf for leaf in self._header.leaves if isinstance(leaf, _Placed) and leaf.piece == number)
        )

    def _spread(self, number: int) -> None:
        """Put the tensors of a dense piece in their places."""
        shift = self._header.pieces[number].shift
        for key, part in self._parts.get(number, {}).items():
            self._memory[number].as_strided(key.shape, key.stride, shift + key.offset).copy_(part)

    def _leaf(self, leaf: _Value | _Empty | _Placed) -> Any:
        if isinstance(leaf, _Value):
            return leaf.value
        if isinstance(leaf, _Empty):
            device = self.device if leaf.moves else "cpu"
            return torch.empty_strided(leaf.shape, leaf.stride, dtype=leaf.dtype, device=device)
        shift = self._header.pieces[leaf.piece].shift
        return self._memory[leaf.piece].as_strided(leaf.shape, leaf.stride, shift + leaf.offset)
