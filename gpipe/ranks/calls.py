"""What ranks call together: it ends on all of them when it fails on one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from gpipe.ranks.error_board import ErrorBoard, Failure, OtherRankFailed, RankLost
from gpipe.ranks.group_transport import GroupTransport, Wires
from gpipe.ranks.routes import ConnectionLost
from gpipe.transport import Aborted

_PATIENCE = 1.0  # seconds to wait for threads, of which some wait for ranks that are gone


class Calls:
    """The calls of one pipe.

    Args:
        wires: To the other ranks.
        board: Where a rank that fails says so.
        rank: This one.
        give_up: Called when a call fails, to release ranks that wait for this one in other ways than on the wires.
    """

    def __init__(self, wires: Wires, board: ErrorBoard, rank: int, give_up: Callable[[], None] | None) -> None:
        self.wires, self._board, self._rank = wires, board, rank
        self._give_up = give_up
        self._failure: Failure | None = None

    def close(self) -> None:
        """Let the threads end, and wait a moment: one that is still in torch when the interpreter ends aborts it.

        Then the groups are destroyed.
        """
        self.wires.close()
        self._board.close()
        deadline = time.monotonic() + _PATIENCE
        for thread in (*self.wires.threads, self._board.thread):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self.wires.destroy(deadline)

    @contextmanager
    def running(self, step: int) -> Iterator[GroupTransport]:
        """Run a call inside, after ``step`` steps: what fails in it ends it on every rank.

        Raises:
            OtherRankFailed: It failed on another rank. RankLost: That cannot be reached.
            RuntimeError: A call failed before.
        """
        if self._failure is not None:
            raise RuntimeError(
                f"this pipe is broken: {self._failure}. Ranks are no longer in step: end all of them and start again "
                "from the last save, or make a new pipe on every rank"
            )
        transport = GroupTransport(self.wires)
        try:
            with self._board.watched(transport.abort):
                yield transport
        except (Aborted, ConnectionLost) as error:
            self._leave(transport)
            found = transport.loss or error
            if not isinstance(found, (Aborted, ConnectionLost)):  # in a thread of this rank that sends or receives
                self._fail(found, step)
                raise found from None
            self._fail_after(found, step)
        except BaseException as error:
            self._leave(transport)
            self._fail(error, step)
            raise

    def _fail(self, error: BaseException, step: int) -> None:
        """Tell the others that this rank failed."""
        self._failure = Failure.of(error, self._rank, step)
        self._board.post(self._failure)

    def _leave(self, transport: GroupTransport) -> None:
        """Let nobody wait for this rank."""
        transport.abort()
        if self._give_up is not None:
            self._give_up()

    def _fail_after(self, error: BaseException, step: int) -> NoReturn:
        """Raise for a failure elsewhere: the one posted, or, of a rank that died without a word, its loss."""
        failure, kind = self._board.read(patient=True), OtherRankFailed
        if failure is None:
            lost = RuntimeError("the store of the process group was lost") if isinstance(error, Aborted) else error
            failure, kind = Failure.of(lost, self._rank, step), RankLost
            self._board.post(failure, patient=False)  # who is gone will not hear of it
        self._failure = failure
        raise kind(f"{failure}; the step was ended on rank {self._rank} too") from None
