"""A schedule as text: a line a worker, a column a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gpipe.actions import Actions
from gpipe.order import NEVER, Order

_ROWS, _COLUMNS = 16, 24  # of a picture in a message


def by_step(order: Order) -> str:
    """Every action as early as its order and needs allow; what waits for ever is marked and not followed."""
    return _lines([_stepped(order, w) for w in range(len(order.first) - 1)], {})


def around(order: Order, worker: int) -> str:
    """As ``by_step``; of a large schedule the part around the action that ``worker`` is stuck at."""
    rows = [_stepped(order, w) for w in range(len(order.first) - 1)]
    return _cut(rows, worker, len(rows[worker]) - 1)


def in_row(workers: Sequence[Actions], marked: Sequence[tuple[int, int]]) -> str:
    """The actions one after the other, those at ``marked`` (worker, position) with an arrow; the part around them."""
    rows = [[str(action) for action in actions] for actions in workers]
    for worker, position in marked:
        rows[worker][position] += "<--"
    return _cut(rows, *(marked[0] if marked else (0, 0)))


def _stepped(order: Order, worker: int) -> list[str]:
    begin, end = int(order.first[worker]), int(order.first[worker + 1])
    row: list[str] = []
    for action, step in zip(order.actions[begin:end], order.step[begin:end].tolist(), strict=True):
        if step == NEVER:
            row.append(f"{action}<--")
            break
        row += [""] * (step - len(row))
        row.append(str(action))
    return row


def _cut(rows: list[list[str]], worker: int, column: int) -> str:
    """The rows and columns around a place, all of them if they are few."""
    top = max(0, min(worker - _ROWS // 2, len(rows) - _ROWS))
    left = max(0, min(column - _COLUMNS // 2, max(map(len, rows), default=0) - _COLUMNS))
    kept: list[list[str]] = []
    hidden: dict[int, tuple[bool, bool]] = {}
    for w in range(top, min(top + _ROWS, len(rows))):
        hidden[w] = left > 0, len(rows[w]) > left + _COLUMNS
        kept.append(rows[w][left : left + _COLUMNS])
    picture = _lines(kept, hidden, top)
    return picture if len(kept) == len(rows) else f"{picture}\n({len(rows)} workers, {len(kept)} shown)"


def _lines(rows: list[list[str]], hidden: Mapping[int, tuple[bool, bool]], top: int = 0) -> str:
    width = max((len(cell) for row in rows for cell in row), default=0)
    lines = []
    for w, row in enumerate(rows, top):
        before, after = hidden.get(w, (False, False))
        text = " ".join(cell.ljust(width) for cell in row)
        lines.append(f"worker {w}: {'... ' * before}{text}{' ...' * after}".rstrip())
    return "\n".join(lines)
