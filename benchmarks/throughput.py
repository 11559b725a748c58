"""How fast do two stages train on two cores, against the ceiling of those cores and against the peers?

Run: python -m benchmarks.throughput [--rounds 2] [--chunks 8] [--models Transformer ...] [--grid]
     python -m benchmarks.throughput --engine distributed [--against torch] ...   (see benchmarks/distributed.py)

Peers: pip install '.[peers]'. Those that are not there are named in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import harness
from benchmarks.bars import bars
from benchmarks.contenders import STAGES, Contender
from benchmarks.doors import timed_step
from benchmarks.harness import Result, Samples, contest, interleave, ratio, report
from benchmarks.match import OUR_CUT, PEERS, Balances, Match, missing_note, parser, sources_note
from benchmarks.models import NETS

QUESTION = "How fast do two stages train on two cores, against the ceiling of those cores and against the peers?"

# door, schedule, recompute, intra-op threads
BASES = (("plain", "gpipe", "never", 1), ("plain", "gpipe", "never", 2), ("ceiling", "gpipe", "never", 1))
MINE = ("GPipe", "DistributedGPipe")
OURS = (
    ("GPipe", "gpipe", "never", 1),
    ("GPipe", "one_f_one_b", "never", 1),
    ("DistributedGPipe", "gpipe", "never", 1),
    ("DistributedGPipe", "one_f_one_b", "never", 1),
)
GRID = (
    ("GPipe", "gpipe", "except_last", 1),
    ("GPipe", "gpipe", "always", 1),
    ("GPipe", "gpipe_zero_bubble", "never", 1),
    ("GPipe", "zero_bubble_h1", "never", 1),
    ("DistributedGPipe", "gpipe_zero_bubble", "never", 1),
    ("DistributedGPipe", "zero_bubble_h1", "never", 1),
)
THEIRS = (
    ("torch", "ScheduleGPipe", "never", 1),
    ("torch", "Schedule1F1B", "never", 1),
    (OUR_CUT, "ScheduleGPipe", "never", 1),
    (OUR_CUT, "Schedule1F1B", "never", 1),
    ("torchgpipe", "gpipe", "never", 2),
    ("fairscale", "gpipe", "never", 2),
)


@dataclass(frozen=True)
class Measured:
    """One model with one number of micro-batches.

    Attributes:
        net: Name of the model.
        chunks: M.
        samples: Of the contenders that ran.
        failed: Why the others did not.
        bound: Seconds of a pipeline that loses nothing but its bubble; see ``bounds``.
    """

    net: str
    chunks: int
    samples: dict[Contender, Samples]
    failed: dict[Contender, str]
    bound: Samples

    def of(self, doors: Sequence[str]) -> dict[Contender, Samples]:
        """The samples of these doors."""
        return {c: s for c, s in self.samples.items() if c.door in doors and c.stages > 1}

    def against(self, doors: Sequence[str]) -> list[str]:
        """Of the fastest of these doors: what it is, samples a second, of the bound, and ours over it."""
        found = self.of(doors)
        if not found:
            return ["", "", "", ""]
        best, samples = fastest(found)
        gain = contest(list(self.of(MINE).values()), list(found.values()))
        speed = best.trains().rows / samples.median
        return [label(best), f"{speed:.1f}", f"{ratio(self.bound, samples):.3f}", f"{gain:.3f}"]


def fastest(found: dict[Contender, Samples]) -> tuple[Contender, Samples]:
    """The contender of the smallest median."""
    return min(found.items(), key=lambda pair: pair[1].median)


def bounds(ceiling: Samples, by_rank: Sequence[Sequence[float]], chunks: int) -> Samples:
    """The bound by round.

    The slowest stage is busy all the time, and waits for one micro-batch to pass the others: for even stages this is
    the ceiling times (M + K - 1) / M.

    Args:
        ceiling: Samples of the ceiling.
        by_rank: For each of them the seconds of every rank's stage on its own.
        chunks: M.
    """
    return Samples([max(ranks) + (sum(ranks) - max(ranks)) / chunks for ranks in by_rank], ceiling.foreign)


class _Stages:
    """The ceiling's seconds, the slower rank's; remembers those of every rank."""

    def __init__(self, match: Match, contender: Contender) -> None:
        self._match, self._contender = match, contender
        self.by_rank: list[list[float]] = []

    def __call__(self) -> float:
        answers = self._match.answers(self._contender)
        if answers is None:
            raise RuntimeError(f"the ceiling failed: {self._match.failed[self._contender]}")
        self.by_rank.append([seconds for seconds, _ in answers])
        return max(self.by_rank[-1])


def contenders(net: str, chunks: int, size: str, balances: Balances, grid: bool) -> list[Contender]:
    """All that run on one model."""
    made = [
        Contender(door, net, chunks, size, balances.of(door), schedule, recompute, threads)
        for door, schedule, recompute, threads in (*BASES, *OURS, *(GRID if grid else ()), *THEIRS)
        if balances.has(door)
    ]
    made.append(Contender("plain", net, 1, size, balances.of("plain"), threads=STAGES))
    if grid:
        whole = balances.of("plain")
        made.append(Contender("GPipe", net, chunks, size, whole))
        made.append(Contender("GPipe", net, chunks, size, whole, recompute="except_last"))
    return made


def measured(net: str, chunks: int, size: str, balances: Balances, grid: bool, rounds: int) -> Measured:
    """Time all contenders on one model, in turns."""
    match = Match(timed_step)
    try:
        able = match.able(contenders(net, chunks, size, balances, grid))
        runs: dict[str, Callable[[], float]] = {str(c): match.slowest(c) for c in able}
        top = next(c for c in able if c.door == "ceiling")
        stages = _Stages(match, top)
        found = interleave(runs | {str(top): stages}, rounds)
        bound = bounds(found[str(top)], stages.by_rank[1:], chunks)  # the first was the warm-up's
        return Measured(net, chunks, {c: found[str(c)] for c in able}, match.failed, bound)
    finally:
        match.close()


def label(contender: Contender) -> str:
    """A contender in a table."""
    if contender.door == "ceiling":
        return "ceiling: all stages busy, no messages"
    threads = "" if contender.threads == 1 else f", {contender.threads} threads"
    keep = "" if contender.recompute == "never" else f", {_recompute(contender.recompute)}"
    if contender.door == "plain":
        loop = "no micro-batches" if contender.chunks == 1 else "plain loop"
        return f"{loop}{threads or ', 1 thread'}{keep}"
    stages = "" if contender.stages == STAGES else f", K={contender.stages}"
    return f"{contender.door} {contender.schedule}{keep}{stages}{threads}"


def _recompute(recompute: str | tuple[int, ...]) -> str:
    if isinstance(recompute, tuple):
        return f"keep {' '.join(map(str, recompute))}"
    return {"cells": "checkpoint a cell", "stage": "checkpoint a stage"}.get(recompute, recompute)


def table(about: Measured, size: str) -> Result:
    """All contenders on one model."""
    rows = []
    rows_of_batch = NETS[size][about.net].rows
    for contender, samples in about.samples.items():
        seconds = samples.median
        spread = f"{rows_of_batch / max(samples.seconds):.1f} to {rows_of_batch / min(samples.seconds):.1f}"
        share = f"{ratio(about.bound, samples):.3f}" if contender.stages > 1 else ""
        balance = "+".join(map(str, contender.balance))
        rows.append([label(contender), balance, f"{rows_of_batch / seconds:.1f}", spread, f"{seconds:.3f}", share])
    rows += [[label(c), "+".join(map(str, c.balance)), "failed", why, "", ""] for c, why in about.failed.items()]
    columns = ["contender", "balance", "samples/s", "spread", "s", "bound / s"]
    return Result(f"{about.net}, M={about.chunks}: {NETS[size][about.net].about}", columns, rows)


def summary(all_of_them: Sequence[Measured], note: str) -> Result:
    """Our best beside the best peer, everywhere, and beside torch with our cut."""
    rows = []
    for about in all_of_them:
        best, samples = fastest(about.of(MINE))
        row = [f"{about.net}, M={about.chunks}", label(best), f"{best.trains().rows / samples.median:.1f}"]
        row.append(f"{ratio(about.bound, samples):.3f}")
        _, speed, _, gain = about.against((OUR_CUT,))
        rows.append([*row, *about.against(PEERS), speed, gain])
    columns = ["model", "our best", "samples/s", "bound / s", "best peer", "samples/s", "bound / s", "ours / peer's"]
    columns += ["torch, our cut: samples/s", "ours / its"]
    return Result(f"Training steps, K={STAGES}, {STAGES} cores: samples a second", columns, rows, note)


def notes(found: Sequence[Balances]) -> str:
    """How to read the tables, and what they do not show."""
    return " ".join(
        [
            "Medians of runs in turns in the same two processes, spreads over all of them; samples during which other "
            "processes took more than 6 % of the machine are left out of medians. Ratios are medians of those within a "
            "round, which shares the machine's slower and faster minutes; the best of ours and the best of theirs are "
            "chosen, for each round, by the other rounds. Bound: seconds of the slowest stage on its own while "
            "the other runs too (ceiling), and of one micro-batch on each other stage; even stages: ceiling x "
            "(M+K-1)/M. It is measured too, so noise lets some pass it. A step is forward, loss on every "
            "micro-batch and backward, all activations kept unless said; the optimizer's step, alike for all, is not "
            "in it. No micro-batches: the mini-batch at once, for models without batch norm the same training.",
            sources_note(found),
            "Torchgpipe and fairscale's Pipe have one worker for all CPU devices and so cannot overlap stages here; "
            "they get both cores as intra-op threads. That says nothing of them on GPUs. Nor is this about more than "
            "two stages, links between hosts, or sizes at which kernels no longer fit a cache.",
            missing_note(found[0].missing),
        ]
    ).strip()


def figure(all_of_them: Sequence[Measured], size: str) -> None:
    """Samples a second over those of the bound."""
    names = [label(Contender(d, "", 0, size, (1, 1), s, r, t)) for d, s, r, t in (*OURS, *THEIRS)]
    series: dict[str, list[float | None]] = {name: [] for name in names}
    for about in all_of_them:
        share = {label(c): ratio(about.bound, s) for c, s in about.samples.items()}
        for name, heights in series.items():
            heights.append(share.get(name))
    groups = [f"{about.net}\nM={about.chunks}" for about in all_of_them]
    title = f"Speed of {STAGES} stages on {STAGES} cores, of ceiling x bound"
    bars(harness.RESULTS / "throughput.svg", title, "bound / seconds", groups, series, line=1.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    options = parser(QUESTION, rounds=2)
    options.add_argument("--grid", action="store_true", help="also K=1, and our other schedules and ways to recompute")
    options.add_argument("--engine", choices=["threads", "distributed"], default="threads")
    options.add_argument("--against", choices=["torch"], help="with --engine distributed: torch's pipeline runs too")
    given = options.parse_args(argv)
    if given.engine == "distributed":
        from benchmarks.distributed import compare

        return compare(given.against == "torch", given.rounds, given.chunks)
    if given.against:
        options.error("--against torch compares ranks: give --engine distributed too")
    across(given.models, given.chunks, given.size, given.grid, given.rounds)


def across(nets: Sequence[str], chunks: Sequence[int], size: str, grid: bool, rounds: int) -> None:
    """Measure and report all contenders on these models.

    Args:
        nets: Names of the models.
        chunks: Numbers of micro-batches.
        size: A key of ``NETS``.
        grid: Whether our further settings run too.
        rounds: Counted rounds.
    """
    found: list[Measured] = []
    balances: list[Balances] = []
    for net in nets:
        for m in chunks:
            balances.append(Balances(NETS[size][net], m, STAGES))
            found.append(measured(net, m, size, balances[-1], grid, rounds))
    results = [summary(found, notes(balances)), *(table(about, size) for about in found)]
    samples = {f"{a.net}, M={a.chunks}: {label(c)}": s for a in found for c, s in a.samples.items()}
    samples |= {f"{a.net}, M={a.chunks}: bound": a.bound for a in found}
    report("throughput", results, samples)
    figure(found, size)


if __name__ == "__main__":
    main()
