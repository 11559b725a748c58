"""Schedules as files, in the notation of torch.distributed.pipelining: a line a rank, ``0F0,0F1,0B1,0B0``."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from gpipe.actions import Action, Kind, ScheduleError

_ACTION = re.compile(r"(\d+)([FRBIW])(\d+)", re.ASCII)
_TOGETHER = re.compile(r"\(([^()]*)\)OVERLAP_F_B")


def write(path: str | PathLike[str], workers: Iterable[Sequence[Action]]) -> None:
    """Write one line a worker."""
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([str(action) for action in actions] for actions in workers)


def read(path: str | PathLike[str]) -> tuple[str, list[list[Action]]]:
    """The file's name without suffix, and the actions of every line.

    Raises:
        ScheduleError: A cell is no computation, or there is none at all.
    """
    with Path(path).open(newline="") as file:
        lines = list(csv.reader(file))
    workers = [
        [action for cell in cells if cell.strip() for action in _actions(cell.strip(), f"{path}, line {number}")]
        for number, cells in enumerate(lines, 1)
    ]
    if not any(workers):
        raise ScheduleError(f"{path} holds no actions: expected a line a rank, such as 0F0,0F1,0B1,0B0")
    return Path(path).stem, workers


def _actions(cell: str, place: str) -> list[Action]:
    together = _TOGETHER.fullmatch(cell)
    return [_action(text.strip(), place) for text in (together[1].split(";") if together else [cell])]


def _action(text: str, place: str) -> Action:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ScheduleError(
            f"{place}: expected [stage][F, R, B, I or W][micro-batch] such as 2F0, got {text!r}. "
            "Messages and sharding have no place here: have torch dump with format='compute_only'"
        )
    stage, kind, micro_batch = match.groups()
    return Action(int(stage), Kind(kind), int(micro_batch))
