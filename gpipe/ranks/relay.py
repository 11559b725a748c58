"""What ranks tell each other around a step: that it begins, with what, and that all have done their part.

It goes from rank to rank along a tree: down a pipeline's workers from the first to the last, as the pipeline itself
does, and from the first worker of a replica to those of two more. So the last rank to be ready is waited for once, and
no rank talks to more than four others.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from gpipe.ranks.group_transport import GroupTransport, Lane
from gpipe.ranks.mesh import Position

Told = dict[Any, Any]


def links(position: Position) -> list[tuple[int, int]]:
    """Every pair of ranks that talk, the one nearer to the root first."""
    grid = position.grid
    down = [(before, after) for ranks in grid for before, after in pairwise(ranks)]
    across = [(grid[(r - 1) // 2][0], grid[r][0]) for r in range(1, len(grid))]
    return down + across


class Relay:
    """A rank's place in the tree, for one call.

    Args:
        position: Of the rank.
        transport: The channels of the call.
    """

    def __init__(self, position: Position, transport: GroupTransport) -> None:
        self._position = position
        self._rank = position.rank
        self._before = next((a for a, b in links(position) if b == self._rank), None)
        self._behind = [b for a, b in links(position) if a == self._rank]
        self._transport = transport

    def start(self, call: str, mode: str, step: int, rows: int | None = None) -> int | None:
        """Begin a call together.

        Args:
            call: What is called on this rank.
            mode: Training or eval mode.
            step: Number of training steps before.
            rows: Of the mini-batch, where a first stage is.

        Returns:
            The number of rows of this pipeline's mini-batch.

        Raises:
            RuntimeError: The root does something else.
        """
        if self._before is None:
            told: list[Any] = [call, mode, step, rows]
        else:
            self._await(self._before, Lane.START)
            told = self._heard(self._before, Lane.START)
        if self._position.worker == 0:
            told[3] = rows
        self._pass_on(Lane.START, told)
        if told[:3] != [call, mode, step]:
            raise RuntimeError(
                f"all ranks must make the same calls, but rank {self._position.grid[0][0]} calls {told[0]} in "
                f"{told[1]} mode after {told[2]} steps, rank {self._rank} {call} in {mode} mode after {step}"
            )
        own: int | None = told[3]
        return own

    def will_be_done(self) -> None:
        """Make ready to hear that others have done their part: far away, that is at once when they say so."""
        for behind in self._behind:
            self._await(behind, Lane.DONE)
        if self._before is not None:
            self._await(self._before, Lane.ALL_DONE)

    def all_done(self, mine: Mapping[Any, Any]) -> Told:
        """Wait until every rank has done its part, so that none takes gradients of a step that failed.

        ``will_be_done`` comes first.

        Args:
            mine: What this rank has to tell.

        Returns:
            What all ranks told.
        """
        told = dict(mine)
        for behind in self._behind:
            told |= self._heard(behind, Lane.DONE)[0]
        if self._before is not None:
            self._transport.send(self._rank, self._before, Lane.DONE, 0, [told])
            (told,) = self._heard(self._before, Lane.ALL_DONE)
        self._pass_on(Lane.ALL_DONE, [told])
        return told

    def _await(self, rank: int, lane: Lane) -> None:
        self._transport.open((rank, self._rank, lane), 1)

    def _heard(self, rank: int, lane: Lane) -> list[Any]:
        message: list[Any] = self._transport.receive(rank, self._rank, lane, 0)
        return list(message)

    def _pass_on(self, lane: Lane, message: list[Any]) -> None:
        for rank in self._behind:
            self._transport.send(self._rank, rank, lane, 0, message)
