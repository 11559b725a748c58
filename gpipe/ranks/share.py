"""What a rank has of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gpipe.ranks.mesh import Position
from gpipe.ranks.tied_ranks import Shared
from gpipe.stage import Stage
from gpipe.tied import Tied
from gpipe.ways import Ways


@dataclass(frozen=True)
class Share:
    """A rank's part.

    Attributes:
        position: Where the rank stands; its worker performs the schedule's actions of that number.
        hosts: For every stage of the pipeline the worker that hosts it.
        ways: For every stage its skip connections.
        stages: The rank's own by their index.
        device: Where they live.
        tied: Parameters of several cells that this rank has, with the places in its own stages.
        shared: Those of them that other ranks have too.
    """

    position: Position
    hosts: Sequence[int]
    ways: Sequence[Ways]
    stages: Mapping[int, Stage]
    device: torch.device
    tied: Sequence[Tied] = ()
    shared: Sequence[Shared] = ()

    @property
    def rank(self) -> int:
        """The rank in the world."""
        return self.position.rank

    @property
    def worker(self) -> int:
        """Which worker of its pipeline the rank is."""
        return self.position.worker

    @property
    def last(self) -> int:
        """Index of the pipeline's last stage."""
        return len(self.hosts) - 1

    @property
    def is_first(self) -> bool:
        """Whether the first stage is here."""
        return self.hosts[0] == self.worker

    @property
    def is_last(self) -> bool:
        """Whether the last stage is here."""
        return self.hosts[-1] == self.worker
