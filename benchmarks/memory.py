"""How many bytes does every stage hold at its peak, and what is the largest model that fits a cap?

Run: python -m benchmarks.memory [--chunks 8] [--models Transformer ...]

Peers: pip install '.[peers]'. Those that are not there are named in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import harness
from benchmarks.bars import bars
from benchmarks.contenders import STAGES, Contender
from benchmarks.doors import peaks_of
from benchmarks.harness import Result, report
from benchmarks.largest import largest_models
from benchmarks.match import OUR_CUT, Balances, Match, missing_note, parser, sources_note
from benchmarks.models import NETS
from benchmarks.throughput import label

QUESTION = "How many bytes does every stage hold at its peak, and what is the largest model that fits a cap?"

# door, schedule, recompute
SETTINGS = (
    ("plain", "gpipe", "never"),
    ("plain", "gpipe", "cells"),
    ("GPipe", "gpipe", "never"),
    ("GPipe", "gpipe", "except_last"),
    ("GPipe", "one_f_one_b", "never"),
    ("DistributedGPipe", "gpipe", "never"),
    ("DistributedGPipe", "gpipe", "except_last"),
    ("DistributedGPipe", "one_f_one_b", "never"),
    ("DistributedGPipe", "one_f_one_b", "always"),
    ("torch", "ScheduleGPipe", "never"),
    ("torch", "ScheduleGPipe", "stage"),
    ("torch", "Schedule1F1B", "never"),
    ("torch", "Schedule1F1B", "cells"),
    (OUR_CUT, "ScheduleGPipe", "never"),
    (OUR_CUT, "Schedule1F1B", "never"),
    (OUR_CUT, "Schedule1F1B", "cells"),
    ("torchgpipe", "gpipe", "never"),
    ("torchgpipe", "gpipe", "except_last"),
    ("fairscale", "gpipe", "never"),
    ("fairscale", "gpipe", "except_last"),
)
MEGA = 2**20


def contenders(net: str, chunks: int, size: str, balances: Balances) -> list[Contender]:
    """All that run on one model; the naive one takes the whole mini-batch at once."""
    naive = Contender("plain", net, 1, size, balances.of("plain"))
    return [naive] + [
        Contender(door, net, chunks, size, balances.of(door), schedule, recompute)
        for door, schedule, recompute in SETTINGS
        if balances.has(door)
    ]


def peaks(match: Match, contender: Contender) -> list[int] | None:
    """Of every stage the bytes it holds at most; None where it cannot run, the reason in ``match.failed``."""
    answers = match.answers(contender)
    if answers is None:
        return None
    found: dict[int, int] = {}
    for _, stages in answers:
        found |= stages
    return [found[k] for k in range(contender.stages)]


def table(net: str, size: str, found: dict[Contender, list[int]], failed: dict[Contender, str]) -> Result:
    """All contenders on one model."""
    rows = []
    for contender, stages in found.items():
        sizes = " ".join(f"{b / MEGA:.2f}" for b in stages)
        name = label(contender) + (f", M={contender.chunks}" if contender.door == "plain" else "")
        rows.append([name, "+".join(map(str, contender.balance)), sizes, f"{max(stages) / MEGA:.2f}"])
    rows += [[label(c), "+".join(map(str, c.balance)), "failed", why] for c, why in failed.items()]
    columns = ["contender", "balance", "MiB of every stage", "fullest"]
    return Result(f"{net}: {NETS[size][net].about}", columns, rows)


def notes(balances: Sequence[Balances]) -> str:
    """How to read the tables, and what they do not show."""
    return " ".join(
        [
            "Peak of the second step: parameters, buffers, gradients, on the first stage the inputs, and every storage "
            "that operators make in the stage's threads, each counted once until it is freed; no optimizer's state. "
            "Boundaries are copied as if every stage had a device of its own. Not counted: the targets, what an "
            "operator takes and gives back inside, an allocator's rest, and what messages on their way take in the "
            "transport: torch's buffers for receiving are counted, as they are made in the stage's thread.",
            sources_note(balances),
            missing_note(balances[0].missing),
        ]
    ).strip()


def figure(found: dict[str, dict[Contender, list[int]]]) -> None:
    """The fullest stage of every contender."""
    names = list(dict.fromkeys(label(c) for by in found.values() for c in by if c.door != "plain"))
    heights: dict[str, list[float | None]] = {name: [] for name in names}
    for by in found.values():
        of = {label(c): max(stages) / MEGA for c, stages in by.items()}
        for name in names:
            heights[name].append(of.get(name))
    bars(harness.RESULTS / "memory.svg", "Fullest of two stages", "MiB", list(found), heights)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    given = parser(QUESTION).parse_args(argv)
    results: list[Result] = []
    balances: list[Balances] = []
    first: dict[str, dict[Contender, list[int]]] = {}
    for chunks in given.chunks:
        for net in given.models:
            balances.append(Balances(NETS[given.size][net], chunks, STAGES))
            match = Match(peaks_of)
            try:
                asked = contenders(net, chunks, given.size, balances[-1])
                found: dict[Contender, Any] = {c: peaks(match, c) for c in asked}
            finally:
                match.close()
            ran = {c: stages for c, stages in found.items() if stages is not None}
            first.setdefault(net, ran)
            results.append(table(net, given.size, ran, match.failed))
    results[0] = Result(results[0].title, results[0].columns, results[0].rows, notes(balances))
    results += largest_models(given.size)
    report("memory", results, {})
    figure(first)


if __name__ == "__main__":
    main()
