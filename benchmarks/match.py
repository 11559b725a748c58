"""Contenders against each other, in turns in the same two processes; one that cannot run is named with the reason."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gpipe
from benchmarks import peers
from benchmarks.contenders import Contender
from benchmarks.distributed import Make, Ranks
from benchmarks.models import NETS, Net
from gpipe.partitioning.cells import cells_of

PEERS = ("torch", "torchgpipe", "fairscale")
OUR_CUT = "torch, our cut"
"""Torch's pipelining, which has no tool for balance, handed the cells per stage that ours chose."""


class Match:
    """Two rank processes, made anew where a contender fails in them.

    Args:
        make: What the ranks make of a contender; see ``Ranks``.

    Attributes:
        failed: By contender why it did not run.
    """

    def __init__(self, make: Make) -> None:
        self._make = make
        self._ranks = Ranks(make)
        self.failed: dict[Contender, str] = {}

    def answers(self, contender: Contender) -> list[tuple[float, Any]] | None:
        """Every rank's seconds for one step, and what it returned; None, and the reason in ``failed``, if it fails."""
        try:
            return self._ranks.run(contender, contender.chunks)
        except (RuntimeError, EOFError) as error:
            self.failed[contender] = str(error).strip().splitlines()[-1]
            self._ranks.close()
            self._ranks = Ranks(self._make)
            return None

    def able(self, contenders: Iterable[Contender]) -> list[Contender]:
        """Those that can run a step."""
        return [contender for contender in contenders if self.answers(contender) is not None]

    def slowest(self, contender: Contender) -> Callable[[], float]:
        """A function that runs a step and gives the seconds of the slower rank."""
        return lambda: self._ranks.slowest(contender, contender.chunks)

    def close(self) -> None:
        """End the processes."""
        self._ranks.close()


def ours(net: Net, chunks: int, stages: int, memory_limit: int | None = None) -> gpipe.GPipe:
    """Our pipe as it divides the model by itself, keeping all activations, or as many as fit a limit."""
    x, _ = net.batch()
    return gpipe.GPipe(
        net.made()[0],
        devices=["cpu"] * stages,
        chunks=chunks,
        sample=x,
        memory_limit=memory_limit,
        checkpoint="never" if memory_limit is None else "auto",
    )


class Balances:
    """Cells per stage of every door, each by its own means, for one model.

    Args:
        net: The model.
        chunks: Number of micro-batches.
        stages: Number of stages.

    Attributes:
        missing: By peer why it is not installed.
        sources: By peer where its balance comes from.
    """

    def __init__(self, net: Net, chunks: int, stages: int) -> None:
        self.missing = peers.missing()
        self.sources: dict[str, str] = {}
        mine = tuple(ours(net, chunks, stages).balance)
        self._found = dict.fromkeys(("ceiling", "GPipe", "DistributedGPipe"), mine)
        self._found["plain"] = (len(cells_of(net.made()[0])),)
        for peer in PEERS:
            if peer not in self.missing:
                self._found[peer], self.sources[peer] = peers.balance_of(peer, net, chunks, stages)
        if self._found.get("torch", mine) != mine:
            self._found[OUR_CUT] = mine

    def has(self, door: str) -> bool:
        """Whether ``door`` is there, and stands for something of its own."""
        return door in self._found

    def of(self, door: str) -> tuple[int, ...]:
        """Those of ``door``, which is there."""
        return self._found[door]


def sources_note(found: Sequence[Balances]) -> str:
    """Where the balances come from, in words."""
    said = {(peer, source) for balances in found for peer, source in balances.sources.items()}
    own = "; ".join(f"{peer} {source}" for peer, source in sorted(said))
    return f"Balance: ours by profile; {own}; torch, which takes any, also ours, where that is another."


def missing_note(missing: dict[str, str]) -> str:
    """Which peers are not there, and why."""
    if not missing:
        return ""
    return "Not installed: " + "; ".join(f"{peer} ({why})" for peer, why in sorted(missing.items())) + "."


def parser(
    question: str, *, rounds: int | None = None, models: Sequence[str] = tuple(NETS["full"]), size: str = "full"
) -> argparse.ArgumentParser:
    """The options that these benchmarks share.

    Args:
        question: What the benchmark answers.
        rounds: Counted rounds, if not said otherwise; None where nothing is timed.
        models: Names of the models, if not said otherwise.
        size: Theirs, if not said otherwise.
    """
    found = argparse.ArgumentParser(description=question)
    if rounds is not None:
        found.add_argument("--rounds", type=int, default=rounds, help="counted rounds")
    found.add_argument("--chunks", type=int, nargs="+", default=[8], help="numbers of micro-batches M")
    found.add_argument("--models", nargs="+", choices=list(NETS["full"]), default=list(models))
    found.add_argument("--size", choices=list(NETS), default=size, help="tiny: for tests")
    return found
