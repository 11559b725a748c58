"""What ranks tell each other around a step: that it begins, with what, and that all have done their part.

It goes from rank to rank in a line that begins where the first stage is, as the pipeline itself does: down the line
before the forwards, up the line behind the backwards, and down again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpipe.group_transport import GroupTransport, Lane
from gpipe.rank_batch import Share


class Line:
    """A rank's place in the line, for one step.

    Args:
        share: The rank's part of the pipeline.
        transport: The channels of the step.
    """

    def __init__(self, share: Share, transport: GroupTransport) -> None:
        ranks = list(dict.fromkeys(share.hosts))
        at = ranks.index(share.rank)
        self._rank = share.rank
        self._first = ranks[0]
        self._before = ranks[at - 1] if at else None
        self._behind = ranks[at + 1] if at + 1 < len(ranks) else None
        self._transport = transport

    def start(self, call: str, mode: str, step: int, rows: int | None) -> int:
        """Begin a step together.

        Args:
            call: What is called on this rank.
            mode: Training or eval mode.
            step: Number of training steps before.
            rows: Of the mini-batch, where the first stage is.

        Returns:
            The number of rows.

        Raises:
            RuntimeError: The first rank does something else.
        """
        if self._before is None:
            told: list[Any] = [call, mode, step, rows]
        else:
            self._await(self._before, Lane.START)
            told = self._heard(self._before, Lane.START)
        self._pass_on(Lane.START, told)
        if told[:3] != [call, mode, step]:
            raise RuntimeError(
                f"all ranks must make the same calls, but rank {self._first} calls {told[0]} in {told[1]} mode after "
                f"{told[2]} steps, rank {self._rank} {call} in {mode} mode after {step}"
            )
        return int(told[3])

    def will_be_done(self) -> None:
        """Make ready to hear that others have done their part: far away, that is at once when they say so."""
        if self._behind is not None:
            self._await(self._behind, Lane.DONE)
        if self._before is not None:
            self._await(self._before, Lane.ALL_DONE)

    def all_done(self, loss: Tensor | None) -> Tensor:
        """Wait until every rank has done its part, so that none takes gradients of a step that failed.

        ``will_be_done`` comes first.

        Args:
            loss: Where the last stage is.

        Returns:
            The loss, where it is or on the CPU.
        """
        told = None if loss is None else loss.cpu()
        if self._behind is not None:
            (behind,) = self._heard(self._behind, Lane.DONE)
            told = behind if told is None else told
        if self._before is not None:
            self._transport.send(self._rank, self._before, Lane.DONE, 0, [told])
            (told,) = self._heard(self._before, Lane.ALL_DONE)
        self._pass_on(Lane.ALL_DONE, [told])
        assert told is not None
        return told if loss is None else loss

    def _await(self, rank: int, lane: Lane) -> None:
        self._transport.open((rank, self._rank, lane), 1)

    def _heard(self, rank: int, lane: Lane) -> list[Any]:
        message: list[Any] = self._transport.receive(rank, self._rank, lane, 0)
        return message

    def _pass_on(self, lane: Lane, message: list[Any]) -> None:
        if self._behind is not None:
            self._transport.send(self._rank, self._behind, lane, 0, message)
