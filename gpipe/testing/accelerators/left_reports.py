"""Reports that the processes of a test leave in a folder when they end, for the pytest run that started them."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path

FOLDER = "GPIPE_SIMULATED_REPORTS"
"""Environment variable with the folder, which the plug-in of pytest sets for the processes that tests start."""


class Leaver:
    """Leaves this process's reports, and those of the processes forked from it, when they end.

    Args:
        reports: What there is to report.
    """

    def __init__(self, reports: Callable[[], list[str]]) -> None:
        self._reports = reports
        self._forking: list[str] = []
        self._known: set[str] = set()
        os.register_at_fork(before=self._before_fork, after_in_child=self._after_fork)
        # processes of multiprocessing that were forked run its finalizers only, others run atexit
        atexit.register(self.leave)
        util.register_after_fork(self, Leaver._finalize)
        self._finalize()

    def leave(self) -> None:
        """Append what was not left yet to a file of this process's own, where there is a folder for it."""
        folder = os.environ.get(FOLDER)
        if not folder or not os.path.isdir(folder):
            return
        found = [report for report in self._reports() if report not in self._known]
        self._known.update(found)
        lines = [json.dumps(f"process {os.getpid()}: {report}") + "\n" for report in found]
        if lines:
            with open(Path(folder, str(os.getpid())), "a") as file:
                file.write("".join(lines))

    def _finalize(self) -> None:
        util.Finalize(None, self.leave, exitpriority=-1)

    def _before_fork(self) -> None:
        self._forking = self._reports()

    def _after_fork(self) -> None:
        self._known = set(self._forking)  # the parent's to tell


class LeftReports:
    """The folder, and what was left there since it was last asked for; while it is open, new processes leave theirs."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gpipe-reports-"))
        self._read: dict[Path, int] = {}  # lines
        self._before = os.environ.get(FOLDER)
        os.environ[FOLDER] = str(self._folder)

    def take(self) -> list[str]:
        """What processes that have ended found."""
        found: list[str] = []
        for path in sorted(self._folder.iterdir()):
            lines = path.read_bytes().split(b"\n")[:-1]  # one that is being written ends without
            found += [json.loads(line) for line in lines[self._read.get(path, 0) :]]
            self._read[path] = len(lines)
        return found

    def close(self) -> None:
        """Remove the folder; a process that ends later leaves nothing."""
        if self._before is None:
            del os.environ[FOLDER]
        else:
            os.environ[FOLDER] = self._before
        shutil.rmtree(self._folder, ignore_errors=True)
