"""How a world of ranks comes to an early end: one of them tells why, the others leave without a word."""

from __future__ import annotations

import json
import os
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from gpipe.ranks.error_board import OtherRankFailed, RankLost
from gpipe.training.errors import ConfigurationError, Interrupted, Silent, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_GRACE = 2.0  # seconds the rank that tells stays for the others to hear, or others leave it to the first
_PATIENCE = 5.0  # seconds others wait until it is told
_AFTER = 1.0  # seconds others leave later: torchrun counts in whole ones, and takes the first failure for the cause
_PAUSE = 0.05


class Ending:
    """Where ranks settle who tells.

    Args:
        store: One that all ranks reach, with a prefix of its own.
        rank: This rank.
        ranks: How many there are.
    """

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks

    def told(self, error: BaseException, name: str, console: Console) -> int:
        """Tell why this rank ends, unless another does; gives the exit code.

        Args:
            error: What ended it.
            name: What a line of this rank begins with.
            console: Where to tell.
        """
        code = _exit_code(error)
        if self._leaves_it_to_another(error):
            return code
        mine = True
        with suppress(RuntimeError):  # a lost store: nobody can say that another tells
            mine = self._store.compare_set("teller", "", str(self._rank)) == str(self._rank).encode()
        if not mine:
            self._hear(_PATIENCE)
            return code
        if not isinstance(error, OtherRankFailed):
            _tell_torchrun(name)
        _print(error, name if self._rank or not isinstance(error, UserError) else "", console)
        with suppress(RuntimeError):
            self._store.set("told", "1")
            deadline = time.monotonic() + (_AFTER if isinstance(error, RankLost) else _GRACE)
            while self._store.add("heard", 0) < self._ranks - 1 and time.monotonic() < deadline:
                time.sleep(_PAUSE)  # whoever keeps the store stays until all have heard
        return code

    def _leaves_it_to_another(self, error: BaseException) -> bool:
        if isinstance(error, Silent) or (isinstance(error, Interrupted) and self._rank):
            self._hear(_PATIENCE)
            return True
        if isinstance(error, ConfigurationError) and self._rank:
            return self._hear(_GRACE)  # mostly all ranks find the same: better that the first tells
        if isinstance(error, RankLost):
            return self._hear(0.0)  # it ended, and had its say before
        return isinstance(error, OtherRankFailed) and self._hear(_PATIENCE)

    def _hear(self, seconds: float) -> bool:
        """Whether another rank has told within so many seconds."""
        deadline = time.monotonic() + seconds
        with suppress(RuntimeError):
            while not self._store.check(["told"]):
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_PAUSE)
            self._store.add("heard", 1)
            time.sleep(_AFTER)
            return True
        return False


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.exit_code if isinstance(error, UserError) else 1


def _tell_torchrun(name: str) -> None:
    """Write down when this rank failed, as torch.distributed.elastic's ``ErrorHandler`` does.

    Without that, torchrun takes the process whose exit it sees first for the cause, and leaving takes a process up to
    seconds.
    """
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        failure = {"message": f"{name}told why above", "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": failure}))


def _print(error: BaseException, name: str, console: Console) -> None:
    if isinstance(error, KeyboardInterrupt):
        text = "stopped at once; what was saved before stays"
    elif isinstance(error, UserError | OtherRankFailed):
        text = str(error)
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    console.print(f"{name}{text}", markup=False, highlight=False, soft_wrap=True)
