"""Parameters that cells on several ranks use.

Every such rank has a copy. The rank with the first of the cells adds up what each cell's backward gave, in the cells'
order, and gives the total back: the copies get the same gradient, and an optimizer keeps them equal to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpipe.ranks.group_transport import GroupTransport, Key, Lane
from gpipe.ranks.mesh import Position
from gpipe.tied import Tied, added


class Shared(NamedTuple):
    """A parameter on several ranks of a pipeline.

    Attributes:
        number: Which of the model's it is.
        parameter: The copy of this rank.
        workers: For each of its cells, or groups of cells that share a module, the worker that has it.
    """

    number: int
    parameter: nn.Parameter
    workers: Sequence[int]

    @property
    def owner(self) -> int:
        """The worker that adds up."""
        return self.workers[0]

    @property
    def others(self) -> list[int]:
        """The other workers that have it."""
        return [w for w in dict.fromkeys(self.workers) if w != self.owner]


def shared_parameters(tied: Sequence[Tied], hosts: Sequence[int]) -> list[Shared]:
    """Those of ``tied`` that several workers have; ``hosts`` has for every stage its worker."""
    found = [Shared(i, p, [hosts[places[0].stage] for places in groups]) for i, (p, groups) in enumerate(tied)]
    return [shared for shared in found if shared.others]


def ways(shared: Sequence[Shared]) -> list[tuple[int, int, Lane]]:
    """What goes between which workers."""
    pairs = sorted({(s.owner, w) for s in shared for w in s.others})
    return [(w, owner, Lane.PARTS) for owner, w in pairs] + [(owner, w, Lane.TOTAL) for owner, w in pairs]


class SharedValues:
    """What the ranks tell each other of their shared parameters, in one call.

    Args:
        shared: Those of this rank.
        position: Of this rank.
        transport: The channels of the call.
    """

    def __init__(self, shared: Sequence[Shared], position: Position, transport: GroupTransport) -> None:
        self._worker, self._ranks = position.worker, position.pipeline
        self._owned = [s for s in shared if s.owner == self._worker]
        self._borrowed = [s for s in shared if s.owner != self._worker]
        self._transport = transport

    def spread(self) -> None:
        """Give every rank the owner's values."""
        for shared in self._owned:
            self._hand_out(shared, shared.parameter.detach())
        for shared, value in zip(self._borrowed, self._received(), strict=True):
            assert value is not None
            with torch.no_grad():
                shared.parameter.copy_(value)

    def gathered(self, parts: Mapping[Tensor, Sequence[Tensor | None]]) -> dict[Tensor, Tensor | None]:
        """Add up, for the parameters this rank owns, what every cell's backward gave.

        Args:
            parts: For every shared parameter of this rank what each of its own cells gave.
        """
        sources = [(s, w) for s in self._owned for w in s.others]
        for worker in dict.fromkeys(w for _, w in sources):
            self._transport.open(self._key(worker, self._worker, Lane.PARTS), sum(w == worker for _, w in sources))
        for s in self._borrowed:
            self._transport.send(*self._key(self._worker, s.owner, Lane.PARTS), s.number, list(parts[s.parameter]))
        totals: dict[Tensor, Tensor | None] = {}
        for s in self._owned:
            told = {self._worker: iter(parts[s.parameter])}
            for w in s.others:
                told[w] = iter(self._transport.receive(*self._key(w, self._worker, Lane.PARTS), s.number))
            totals[s.parameter] = added([next(told[w]) for w in s.workers], s.parameter.device)
        return totals

    def handed_out(self, totals: Mapping[Tensor, Tensor | None]) -> dict[Tensor, Tensor | None]:
        """Give the owners' totals to all; returns those of the parameters this rank does not own."""
        for shared in self._owned:
            self._hand_out(shared, totals[shared.parameter])
        return {s.parameter: total for s, total in zip(self._borrowed, self._received(), strict=True)}

    def _hand_out(self, shared: Shared, value: Tensor | None) -> None:
        for worker in shared.others:
            self._transport.send(*self._key(self._worker, worker, Lane.TOTAL), shared.number, [value])

    def _received(self) -> list[Tensor | None]:
        owners = [s.owner for s in self._borrowed]
        for owner in dict.fromkeys(owners):
            self._transport.open(self._key(owner, self._worker, Lane.TOTAL), owners.count(owner))
        keys = [(self._key(s.owner, self._worker, Lane.TOTAL), s.number) for s in self._borrowed]
        return [self._transport.receive(*key, number)[0] for key, number in keys]

    def _key(self, source: int, target: int, lane: Lane) -> Key:
        return self._ranks[source], self._ranks[target], lane
