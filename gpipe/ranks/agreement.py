"""What all ranks must have alike, compared before any work."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Facts = Mapping[str, str]

_NAMED = 3  # facts in a message


def agree(
    store: Store, rank: int, ranks: int, settle: Callable[[], Facts], failed: str = "refused its arguments"
) -> Facts:
    """Settle the facts on every rank; gives those of rank 0, once all ranks have the same.

    A fact whose name begins with "_" may differ.

    Args:
        store: One that all ranks reach, with a prefix of its own.
        rank: This rank.
        ranks: How many there are.
        settle: Gives the facts, by name; may raise.
        failed: What a rank did then, for messages.

    Raises:
        Exception: What ``settle`` raised here.
        ValueError: It raised on another rank, or the facts differ; the message names ranks and facts.
    """
    refused: Exception | None = None
    entry: dict[str, object] = {}
    try:
        entry["facts"] = dict(settle())
    except Exception as error:
        refused = error
        entry["refused"] = f"{type(error).__name__}: {error}"
    store.set(f"facts {rank}", json.dumps(entry))
    if rank == 0:
        entries = [json.loads(_awaited(store, f"facts {r}")) for r in range(ranks)]
        store.set("verdict", json.dumps([_problem(entries, failed), entries[0].get("facts", {})]))
    problem, facts = json.loads(_awaited(store, "verdict"))
    store.add("read", 1)
    while rank == 0 and problem and store.add("read", 0) < ranks:
        time.sleep(0.01)  # whoever keeps the store stays until all have read
    if refused is not None:
        raise refused
    if problem:
        raise ValueError(problem)
    settled: Facts = facts
    return settled


def told(store: Store, rank: int, ranks: int, name: str, value: str) -> list[str]:
    """What every rank says of ``name``.

    Args:
        store: As for ``agree``.
        rank: This rank.
        ranks: How many there are.
        name: What it is about.
        value: What this rank says.
    """
    store.set(f"{name} {rank}", value)
    return [_awaited(store, f"{name} {r}").decode() for r in range(ranks)]


def _awaited(store: Store, key: str) -> bytes:
    """A value once it is there: looking again and again, unlike a wait in the store, hears Ctrl-C."""
    pause = 0.01
    while not store.check([key]):
        time.sleep(pause)
        pause = min(0.5, 1.2 * pause)
    value: bytes = store.get(key)
    return value


def _problem(entries: list[dict[str, object]], failed: str) -> str:
    """What speaks against these entries of the ranks, or nothing."""
    refused = {rank: entry["refused"] for rank, entry in enumerate(entries) if "refused" in entry}
    if refused:
        rank, reason = next(iter(refused.items()))
        others = f" (so did {len(refused) - 1} others)" if len(refused) > 1 else ""
        return f"rank {rank} {failed}{others}: {reason}"
    facts: list[dict[str, str]] = [entry["facts"] for entry in entries]  # type: ignore[misc]
    names = [n for n in facts[0] if not n.startswith("_") and len({f.get(n) for f in facts}) > 1]
    if not names:
        return ""
    told = "; in ".join(_split(name, facts) for name in names[:_NAMED])
    return f"all ranks must be given the same, but they differ in {told}{'; and more' if len(names) > _NAMED else ''}"


def _split(name: str, facts: list[dict[str, str]]) -> str:
    """Who has which value of a fact, the value most have first."""
    values = [f.get(name, "nothing") for f in facts]
    parts = []
    for value, _ in Counter(values).most_common():
        holders = [rank for rank, v in enumerate(values) if v == value]
        named = ", ".join(map(str, holders[:8])) + (" and more" if len(holders) > 8 else "")
        parts.append(
            f"{'rank' if len(holders) == 1 else 'ranks'} {named} {'has' if len(holders) == 1 else 'have'} {value}"
        )
    return f"{name}: {', '.join(parts)}"
