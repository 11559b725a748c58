"""A cell run by itself: on what the cell before gave, and on what earlier ones stashed for it."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gpipe.partitioning.cells import Cell
from gpipe.partitioning.skips import Key, PartCarrier, carrying, declared, skips_of

Waiting = MutableMapping[Key, Tensor | None]
"""What has been stashed and not yet popped."""


class Passed(NamedTuple):
    """What goes into a cell, or comes out of it; a pytree.

    Attributes:
        value: What the cell before gives, or this one to the next.
        skips: What it pops, or stashes, in the order it is declared in.
    """

    value: Any
    skips: list[Tensor | None]


class Alone(nn.Module):
    """One cell as a function of all that it gets, to all that it gives.

    Args:
        index: Which cell of the model it is.
        name: What it is called.
        cell: The cell.
        pops: Names it takes from earlier cells.
        stashes: Names it gives to later cells.
    """

    def __init__(self, index: int, name: str, cell: nn.Module, pops: tuple[Key, ...], stashes: tuple[Key, ...]) -> None:
        super().__init__()
        self.index, self.name, self.cell, self.pops, self.stashes = index, name, cell, pops, stashes

    def forward(self, entered: Passed) -> Passed:
        """Run the cell."""
        carrier = PartCarrier(dict(zip(self.pops, entered.skips, strict=True)))
        with carrying(carrier):
            value = self.cell(entered.value)
        return Passed(value, carrier.leaving(self.stashes))

    def entered(self, value: Any, waiting: Waiting) -> Passed:
        """What goes into the cell; what it pops no longer waits."""
        return Passed(value, [waiting.pop(key) for key in self.pops])

    def went_on(self, left: Passed, waiting: Waiting) -> Any:
        """What the next cell gets of what came out; what was stashed waits."""
        waiting.update(zip(self.stashes, left.skips, strict=True))
        return left.value

    def __str__(self) -> str:
        return f"cell {self.index} ({self.name!r}, {type(self.cell).__name__})"


def alone(cells: Sequence[Cell]) -> list[Alone]:
    """Every cell by itself.

    Raises:
        TypeError: Declarations of stashes and pops do not match.
    """
    between = {skip.key for skip in skips_of(cells) if skip.source != skip.target}

    def names(cell: nn.Module, what: str) -> tuple[Key, ...]:
        return tuple(key for module in cell.modules() for key in declared(module, what) if key in between)

    return [Alone(i, name, cell, names(cell, "popped"), names(cell, "stashed")) for i, (name, cell) in enumerate(cells)]


def cut(tree: Any) -> Any:
    """The tensors of ``tree`` as leaves, that need a gradient where they did."""
    return tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), tree)
