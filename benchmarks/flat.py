"""Our models for the peers: cells whose boundaries are tensors or tuples of tensors, with skips made explicit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.skips import Key, Skip, carrying, skips_of


@dataclass(frozen=True)
class Form:
    """How a tree of tensors and plain values lies flat.

    Attributes:
        spec: Of the tree.
        constants: Its leaves, ``Tensor`` where a tensor stands.
    """

    spec: TreeSpec
    constants: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> Form:
        """The form of ``tree``."""
        leaves, spec = tree_flatten(tree)
        return cls(spec, tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves))

    def tree(self, tensors: Sequence[Tensor]) -> Any:
        """``tensors`` in their places."""
        waiting = iter(tensors)
        return tree_unflatten([next(waiting) if c is Tensor else c for c in self.constants], self.spec)


class _Hand:
    """Carries what one cell stashes or pops."""

    def __init__(self, held: dict[Key, Tensor | None]) -> None:
        self.held = held

    def put(self, key: Key, value: Tensor | None) -> None:
        self.held[key] = value

    def take(self, key: Key) -> Tensor | None:
        return self.held.pop(key)


class FlatCell(nn.Module):
    """A cell as a function of tensors alone: nothing is remembered from one call to the next.

    Args:
        cell: Takes and gives trees.
        before: The form of what it takes.
        popped: The names it pops, in the order of their tensors.
        stashed: The names it stashes.
    """

    def __init__(self, cell: nn.Module, before: Form, popped: Sequence[Key], stashed: Sequence[Key]) -> None:
        super().__init__()
        self.cell = cell
        self.before, self.popped, self.stashed = before, tuple(popped), tuple(stashed)

    def forward(self, tensors: Sequence[Tensor], popped: Sequence[Tensor] = ()) -> tuple[Any, list[Tensor]]:
        """What the cell gives, flat, and what it stashes."""
        hand = _Hand(dict(zip(self.popped, popped, strict=True)))
        with carrying(hand):
            outputs = [leaf for leaf in tree_flatten(self.cell(self.before.tree(tensors)))[0] if leaf is not None]
        return tuple(outputs), [_tensor(hand.take(key)) for key in self.stashed]


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None, "the benchmarks' models stash tensors"
    return value


def flat_cells(module: nn.Module, sample: Any) -> tuple[list[FlatCell], list[Skip]]:
    """The cells of ``module``, flat, and its skip connections.

    Args:
        module: As for a pipe.
        sample: A micro-batch of inputs: the module is run on it once, to see what passes between the cells.
    """
    cells = cells_of(module)
    skips = skips_of(cells)
    flat, value = [], sample
    with torch.no_grad(), carrying(_Hand({})):
        for i, (_, cell) in enumerate(cells):
            popped = [skip.key for skip in skips if skip.target == i]
            stashed = [skip.key for skip in skips if skip.source == i]
            flat.append(FlatCell(cell, Form.of(value), popped, stashed))
            value = cell(value)
    return flat, skips


def packed(tensors: Sequence[Tensor]) -> Any:
    """A tensor alone as itself, several as a tuple."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def unpacked(tensors: Any) -> tuple[Tensor, ...]:
    """The other way round."""
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
