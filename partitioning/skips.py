"""Values that go from one cell to a later one, past those between: who hands over what, and what carries it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gpipe.partitioning.cells import Cell

Key = tuple[Any, str]
"""A namespace, None for everybody's, and a name."""


class Skip(NamedTuple):
    """A value's way.

    Attributes:
        key: Its name.
        source: Index of the cell that stashes it.
        target: Index of the cell that pops it.
    """

    key: Key
    source: int
    target: int


class Carrier(Protocol):
    """Carries values from stash to pop."""

    def put(self, key: Key, value: Tensor | None) -> None:
        """Take a stashed value."""

    def take(self, key: Key) -> Tensor | None:
        """Give it, once.

        Raises:
            KeyError: Nothing was stashed.
        """


class Hands:
    """Carries values within one graph.

    What is stashed gets a node of its own there, made before whatever uses the tensor afterwards. Autograd therefore
    adds up a tensor's gradients in one order, wherever they come from: of its other uses first, then of every stash.
    """

    def __init__(self) -> None:
        self._values: dict[Key, tuple[Tensor | None, int]] = {}

    def put(self, key: Key, value: Tensor | None) -> None:
        """Take a stashed value."""
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            value = _Handed.apply(value)
        self._values[key] = value, _version(value)

    def take(self, key: Key) -> Tensor | None:
        """Give it, once.

        Raises:
            KeyError: Nothing was stashed. RuntimeError: The tensor was written to since.
        """
        value, version = self._values.pop(key)
        if _version(value) != version:
            raise RuntimeError(
                f"the stashed {key[1]!r} was modified in place before it was popped, which a pipeline would not see: "
                "stash a clone, or do not work in place"
            )
        return value


class PartCarrier(Hands):
    """Carries values through a part of a model: in from cells before it, within, and out to cells behind.

    Args:
        arrived: What comes in.
    """

    def __init__(self, arrived: Mapping[Key, Tensor | None]) -> None:
        super().__init__()
        self._arrived = dict(arrived)

    def take(self, key: Key) -> Tensor | None:
        """As ``Hands``, or what came in."""
        return self._arrived.pop(key) if key in self._arrived else super().take(key)

    def leaving(self, keys: Iterable[Key]) -> list[Tensor | None]:
        """What goes out: the part's own stashes of these names."""
        return [super(PartCarrier, self).take(key) for key in keys]


class _Handed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _version(value: Tensor | None) -> int:
    return -1 if value is None or value.is_inference() else value._version


_thread = threading.local()


def carrier() -> Carrier:
    """What carries values in this thread: outside a pipeline, one for the thread."""
    if not hasattr(_thread, "carrier"):
        _thread.carrier = Hands()
    current: Carrier = _thread.carrier
    return current


@contextmanager
def carrying(current: Carrier) -> Iterator[None]:
    """Let ``current`` carry what this thread's cells stash inside."""
    before = carrier()
    _thread.carrier = current
    try:
        yield
    finally:
        _thread.carrier = before


def skips_of(cells: Sequence[Cell]) -> list[Skip]:
    """Every value that a cell stashes and another, or the same, pops; in the order of the pops.

    Raises:
        TypeError: Declarations of stashes and pops do not match; the message lists every mismatch.
    """
    stashed: dict[Key, int] = {}
    popped: dict[Key, int] = {}
    problems: list[str] = []
    for i, (name, cell) in enumerate(cells):
        for module in cell.modules():
            for verb, keys, found in (
                ("stashed", declared(module, "stashed"), stashed),
                ("popped", declared(module, "popped"), popped),
            ):
                for key in keys:
                    if key in found:
                        problems.append(f"{key[1]!r} is {verb} by cell {cells[found[key]][0]!r} and again by {name!r}")
                    found.setdefault(key, i)
    problems += [
        f"{key[1]!r} is stashed by cell {cells[i][0]!r} and popped by none"
        for key, i in stashed.items()
        if key not in popped
    ]
    problems += [
        f"{key[1]!r} is popped by cell {cells[i][0]!r} and stashed by none"
        for key, i in popped.items()
        if key not in stashed
    ]
    skips = [Skip(key, stashed[key], i) for key, i in popped.items() if key in stashed]
    problems += [
        f"{key[1]!r} is popped by cell {cells[to][0]!r} before cell {cells[at][0]!r} stashes it"
        for key, at, to in skips
        if to < at
    ]
    if problems:
        raise TypeError(
            f"skip connections do not match: {'; '.join(problems)}. Declare every name once in stash=[...] of an "
            "earlier cell and once in pop=[...] of a later one; the same layers twice need a Namespace each (isolate)"
        )
    return sorted(skips, key=lambda skip: skip.target)


def declared(module: nn.Module, what: str) -> Iterable[Key]:
    """What a module itself declares as ``"stashed"``, or as ``"popped"``."""
    declare = getattr(module, "_gpipe_skips", None)
    return () if declare is None else declare(what)
