"""All routes between the ranks of a pipeline: between its stages, between copies of a parameter, and around a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from gpipe.ranks.direct import direct
from gpipe.ranks.group_transport import Key, Lane
from gpipe.ranks.mesh import Position
from gpipe.ranks.relay import links
from gpipe.ranks.routes import Route
from gpipe.transport import Direction
from gpipe.ways import Ways

_Way = tuple[Key, int, int, torch.device]  # from which rank to which, and where what goes that way lives
_OPPOSITE = {Direction.BACKWARD, Direction.SKIP_BACKWARD, Lane.DONE, Lane.PARTS, Lane.TOTAL}


@dataclass(frozen=True)
class Plan:
    """What is to be connected.

    Attributes:
        position: Where this rank stands.
        hosts: For every stage its worker.
        ways: For every stage its skip connections.
        shared: Workers that tell each other of shared parameters.
        device: Where this rank's stages live.
    """

    position: Position
    hosts: Sequence[int]
    ways: Sequence[Ways]
    shared: Sequence[tuple[int, int, Lane]]
    device: torch.device

    def of(self, pipeline: Sequence[int]) -> list[_Way]:
        """All ways of one replica and of the relay, in the same order on every rank.

        Args:
            pipeline: The replica's ranks.
        """
        at = [pipeline[host] for host in self.hosts]
        found: list[_Way] = []
        for k, t in pairwise(range(len(at))):
            found.append(((k, t, Direction.FORWARD), at[k], at[t], self.device))
            found.append(((t, k, Direction.BACKWARD), at[t], at[k], self.device))
        for k, t in [(k, target) for k, one in enumerate(self.ways) for target in one.targets]:
            found.append(((k, t, Direction.SKIP_FORWARD), at[k], at[t], self.device))
            found.append(((t, k, Direction.SKIP_BACKWARD), at[t], at[k], self.device))
        for source, target, lane in self.shared:
            a, b = pipeline[source], pipeline[target]
            found.append(((a, b, lane), a, b, self.device))
        for here, there in links(self.position):
            found.append(((here, there, Lane.START), here, there, torch.device("cpu")))
            found.append(((there, here, Lane.DONE), there, here, torch.device("cpu")))
            found.append(((here, there, Lane.ALL_DONE), here, there, torch.device("cpu")))
        return found


def connected(plan: Plan, accelerators: Sequence[str]) -> dict[Key, Route]:
    """The routes of this rank's pipeline; called on every rank alike.

    Args:
        plan: What is to be connected.
        accelerators: What ``gpipe.ranks.direct.accelerator`` gave on every rank.
    """
    if len(accelerators) == 1:
        return {}
    forward, backward = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    assert isinstance(forward, dist.ProcessGroup)
    assert isinstance(backward, dist.ProcessGroup)
    routes: dict[Key, Route] = {}
    for pipeline in plan.position.grid:
        for tag, (key, source, target, device) in enumerate(plan.of(pipeline)):
            if source == target:
                continue
            straight = None
            if isinstance(key[2], Direction):
                straight = direct(source, target, accelerators, plan.position.rank, plan.device)
            if pipeline is plan.position.pipeline:
                group = backward if key[2] in _OPPOSITE else forward
                routes[key] = Route(source, target, tag, group, device, straight)
    return routes
