"""Where a rank stands: pipelines side by side, each a replica of the others, every worker of them a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

PIPELINE = "pp"  # torch's usual name of that dimension of a mesh


@dataclass(frozen=True)
class Position:
    """A rank's place.

    Attributes:
        rank: The rank in the world.
        grid: For every replica the ranks of its pipeline, worker by worker.
        group: The ranks that hold the same as this one, None if it is the only one.
    """

    rank: int
    grid: Sequence[Sequence[int]]
    group: dist.ProcessGroup | None = None

    @cached_property
    def replica(self) -> int:
        """Which of the pipelines the rank belongs to."""
        return next(r for r, ranks in enumerate(self.grid) if self.rank in ranks)

    @property
    def pipeline(self) -> Sequence[int]:
        """The ranks of its pipeline."""
        return self.grid[self.replica]

    @cached_property
    def worker(self) -> int:
        """Which worker of its pipeline it is."""
        return self.pipeline.index(self.rank)


def position(mesh: Any) -> Position:
    """The place of this rank in ``mesh``; without one all ranks are one pipeline.

    Args:
        mesh: A ``DeviceMesh`` of the whole world: of one dimension, the pipeline, or of two, replicas and pipeline. The
            pipeline is the dimension named "pp", or the last.

    Raises:
        TypeError, ValueError: It is no such mesh.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if mesh is None:
        return Position(rank, [range(ranks)])
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a torch.distributed DeviceMesh, got {type(mesh).__name__}: make one with "
            'init_device_mesh("cpu", (replicas, stages), mesh_dim_names=("dp", "pp"))'
        )
    if mesh.ndim > 2:
        raise ValueError(
            f"mesh must have one dimension, the pipeline, or two, replicas and pipeline; it has {mesh.ndim}, "
            f"{tuple(mesh.mesh.shape)}: make one of two"
        )
    if sorted(mesh.mesh.flatten().tolist()) != list(range(ranks)):
        raise ValueError(
            f"mesh must hold every rank of the world once, but the world has {ranks} ranks and the mesh is "
            f"{mesh.mesh.tolist()}: start {mesh.size()} processes, or make a mesh whose sizes multiply to {ranks}"
        )
    if mesh.ndim == 1:
        return Position(rank, [mesh.mesh.tolist()])
    names = mesh.mesh_dim_names or ()
    pipeline = names.index(PIPELINE) if PIPELINE in names else 1
    grid = mesh.mesh if pipeline == 1 else mesh.mesh.T
    group = mesh.get_group(1 - pipeline) if len(grid) > 1 else None
    return Position(rank, grid.tolist(), group)


def with_own_group(place: Position) -> Position:
    """The same with a group like the mesh's, but of its own; called on every rank alike.

    Whoever used the mesh's after a failure would meet what a broken pipe left in it.
    """
    if place.group is None:
        return place
    backend = dist.get_backend_config(place.group)
    groups = [dist.new_group(list(ranks), backend=backend) for ranks in zip(*place.grid, strict=True)]
    own = groups[place.worker]
    assert isinstance(own, dist.ProcessGroup)
    return replace(place, group=own)
