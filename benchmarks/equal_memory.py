"""At one cap of bytes per stage, how fast is each contender at its best?

Run: python -m benchmarks.equal_memory [--rounds 2] [--chunks 8] [--models Transformer ...] [--share 0.1 0.5]

Peers: pip install '.[peers]'. Those that are not there are named in the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks import harness
from benchmarks.bars import bars
from benchmarks.contenders import STAGES, Contender, tensor_bytes
from benchmarks.doors import peaks_of, timed_step
from benchmarks.harness import Result, Samples, contest, interleave, report
from benchmarks.match import OUR_CUT, PEERS, Balances, Match, missing_note, ours, parser, sources_note
from benchmarks.memory import MEGA, peaks
from benchmarks.models import NETS, Net
from benchmarks.throughput import MINE, fastest, label
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import Infeasible, predict, solve

QUESTION = "At one cap of bytes per stage, how fast is each contender at its best?"

# door, schedule, recompute, intra-op threads; torchgpipe and fairscale cannot overlap stages on CPUs: benchmarks.peers
THEIRS = (
    ("torch", "ScheduleGPipe", "never", 1),
    ("torch", "ScheduleGPipe", "cells", 1),
    ("torch", "ScheduleGPipe", "stage", 1),
    ("torch", "Schedule1F1B", "never", 1),
    ("torch", "Schedule1F1B", "cells", 1),
    ("torch", "Schedule1F1B", "stage", 1),
    (OUR_CUT, "ScheduleGPipe", "never", 1),
    (OUR_CUT, "ScheduleGPipe", "cells", 1),
    (OUR_CUT, "ScheduleGPipe", "stage", 1),
    (OUR_CUT, "Schedule1F1B", "never", 1),
    (OUR_CUT, "Schedule1F1B", "cells", 1),
    (OUR_CUT, "Schedule1F1B", "stage", 1),
    ("torchgpipe", "gpipe", "never", 2),
    ("torchgpipe", "gpipe", "except_last", 2),
    ("fairscale", "gpipe", "never", 2),
    ("fairscale", "gpipe", "except_last", 2),
)


@dataclass(frozen=True)
class Measured:
    """One model under one cap.

    Attributes:
        net: Name of the model.
        cap: Bytes a stage may hold, with Adam's state.
        held: What the fullest stage of each contender that runs holds, with Adam's state.
        samples: Of those that fit.
        failed: Why the others did not run.
    """

    net: str
    cap: int
    held: dict[Contender, int]
    samples: dict[Contender, Samples]
    failed: dict[Contender, str]

    def of(self, doors: Sequence[str]) -> dict[Contender, Samples]:
        """The samples of these doors, of what fits."""
        return {c: s for c, s in self.samples.items() if c.door in doors}

    def against(self, doors: Sequence[str]) -> list[str]:
        """The fastest of these doors, and ours over it."""
        if not any(contender.door in doors for contender in self.held):
            return ["", ""]
        mine, found = self.of(MINE), self.of(doors)
        gain = f"{contest(list(mine.values()), list(found.values())):.3f}" if mine and found else ""
        return [said(found), gain]


def said(found: dict[Contender, Samples]) -> str:
    """The fastest contender and its samples a second."""
    if not found:
        return "none fits"
    best, samples = fastest(found)
    return f"{label(best)}, M={best.chunks}: {best.trains().rows / samples.median:.1f}"


def costs_of(net: Net, chunks: int) -> tuple[list[CellCost], int]:
    """Of every cell, and the bytes of a micro-batch of inputs."""
    x, _ = net.batch()
    return profile(net.made()[0], x, chunks=chunks, company=STAGES - 1), tensor_bytes(x) // chunks


def cap_of(net: Net, chunks: int, share: float) -> int:
    """So much of the way from what our GPipe needs with nothing kept to what it needs with all kept."""
    costs, inputs = costs_of(net, chunks)
    balance = solve(costs, STAGES, micro_batches=chunks, input_bytes=inputs).balance
    low, high = (
        max(predict(costs, balance, micro_batches=chunks, keep=keep, input_bytes=inputs).bytes) for keep in (0, chunks)
    )
    return int(low + share * (high - low))


def planned(name: str, chunks: int, size: str, cap: int) -> list[Contender]:
    """Ours, planned for the cap: GPipe's own ``memory_limit``, and the solver for 1F1B."""
    net = NETS[size][name]
    made = []
    try:
        plan = ours(net, chunks, STAGES, cap).partition
        assert plan is not None, "a sample was given"
        for door in ("GPipe", "DistributedGPipe"):
            made.append(Contender(door, name, chunks, size, plan.balance, "gpipe", plan.keep))
    except Infeasible:
        pass
    costs, inputs = costs_of(net, chunks)
    try:
        plan = solve(costs, STAGES, micro_batches=chunks, schedule="1f1b", memory_limit=cap, input_bytes=inputs)
    except Infeasible:
        return made
    made.append(Contender("GPipe", name, chunks, size, plan.balance, "one_f_one_b", plan.keep))
    for schedule in ("one_f_one_b", "zero_bubble_h1"):
        made.append(Contender("DistributedGPipe", name, chunks, size, plan.balance, schedule, plan.keep))
    return made


def with_state(contender: Contender, held: Sequence[int]) -> int:
    """Bytes of the fullest stage, Adam's two numbers a parameter included."""
    cells = [cell for _, cell in cells_of(contender.trains().made()[0])]
    sizes = [sum(p.nbytes for p in cell.parameters()) for cell in cells]
    ends = [sum(contender.balance[:k]) for k in range(contender.stages + 1)]
    return max(b + 2 * sum(sizes[i:j]) for b, i, j in zip(held, ends[:-1], ends[1:], strict=True))


def measured(name: str, chunks: Sequence[int], size: str, share: float, rounds: int) -> tuple[Measured, Balances]:
    """Count the bytes of every contender, and time in turns those that fit."""
    net = NETS[size][name]
    cap = cap_of(net, max(chunks), share)
    asked: list[Contender] = []
    for m in chunks:
        balances = Balances(net, m, STAGES)
        asked += planned(name, m, size, cap)
        asked += [
            Contender(door, name, m, size, balances.of(door), schedule, recompute, threads)
            for door, schedule, recompute, threads in THEIRS
            if balances.has(door)
        ]
    counting = Match(peaks_of)
    try:
        found = {c: peaks(counting, c) for c in asked}
    finally:
        counting.close()
    held = {c: with_state(c, stages) for c, stages in found.items() if stages is not None}
    match = Match(timed_step)
    try:
        able = match.able(c for c, b in held.items() if b <= cap)
        runs: dict[str, Callable[[], float]] = {str(c): match.slowest(c) for c in able}
        samples = interleave(runs, rounds)
    finally:
        match.close()
    result = Measured(name, cap, held, {c: samples[str(c)] for c in able}, counting.failed | match.failed)
    return result, balances


def table(about: Measured, size: str) -> Result:
    """All contenders on one model."""
    rows = []
    rows_of_batch = NETS[size][about.net].rows
    for contender, held in about.held.items():
        row = [f"{label(contender)}, M={contender.chunks}", "+".join(map(str, contender.balance)), f"{held / MEGA:.2f}"]
        samples = about.samples.get(contender)
        if samples is None:
            rows.append([*row, about.failed.get(contender, "does not fit"), ""])
            continue
        spread = f"{rows_of_batch / max(samples.seconds):.1f} to {rows_of_batch / min(samples.seconds):.1f}"
        rows.append([*row, f"{rows_of_batch / samples.median:.1f}", spread])
    rows += [
        [f"{label(c)}, M={c.chunks}", "+".join(map(str, c.balance)), "failed", why, ""]
        for c, why in about.failed.items()
        if c not in about.held
    ]
    columns = ["contender", "balance", "fullest stage MiB", "samples/s", "spread"]
    return Result(f"{about.net}, {about.cap / MEGA:.2f} MiB a stage: {NETS[size][about.net].about}", columns, rows)


def summary(all_of_them: Sequence[Measured], note: str) -> Result:
    """The best of each under every cap."""
    rows = []
    for about in all_of_them:
        row = [about.net, f"{about.cap / MEGA:.2f}", said(about.of(MINE))]
        rows.append([*row, *about.against(PEERS), *about.against((OUR_CUT,))])
    columns = ["model", "MiB a stage", "our best: samples/s", "best peer: samples/s", "ours / peer's"]
    columns += ["torch, our cut: samples/s", "ours / its"]
    return Result(f"The same bytes for everybody, K={STAGES}, {STAGES} cores", columns, rows, note)


def notes(balances: Sequence[Balances], shares: Sequence[float]) -> str:
    """How to read the tables, and what they do not show."""
    return " ".join(
        [
            f"Caps: {' and '.join(f'{100 * share:.0f} %' for share in shares)} of the way from "
            "what our GPipe schedule is predicted to take with nothing kept "
            "to what it takes with all kept. Bytes are counted as in benchmarks.memory, with Adam's state for all; "
            "contenders that take more are not timed. Ours is planned for the cap beforehand (memory_limit; for 1F1B "
            "the solver), the others have the settings they have: torch.utils.checkpoint around each cell or each "
            "stage, or their own modes. Medians of runs in turns in the same two processes; the optimizer's step is "
            "not in them; ratios are medians of those within a round, the best of both chosen by the other rounds. "
            "What wins depends on the cap. CPUs only, where torchgpipe and fairscale's Pipe "
            "cannot overlap stages and get both cores as intra-op threads.",
            sources_note(balances),
            missing_note(balances[0].missing),
        ]
    ).strip()


def figure(all_of_them: Sequence[Measured], size: str) -> None:
    """The best of each door, over the best peer."""
    doors = (*MINE, OUR_CUT, *PEERS)
    series: dict[str, list[float | None]] = {door: [] for door in doors}
    for about in all_of_them:
        for door in doors:
            found = about.of((door,))
            series[door].append(NETS[size][about.net].rows / fastest(found)[1].median if found else None)
    groups = [f"{about.net}\n{about.cap / MEGA:.1f} MiB" for about in all_of_them]
    bars(harness.RESULTS / "equal_memory.svg", "Best that fits the same cap per stage", "samples/s", groups, series)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    options = parser(QUESTION, rounds=2, models=("Transformer", "AmoebaNet-D", "U-Net"))
    options.add_argument(
        "--share", type=float, nargs="+", default=[0.1, 0.5], help="where caps are between nothing kept and all kept"
    )
    given = options.parse_args(argv)
    if not all(0 <= share <= 1 for share in given.share):
        options.error(f"--share must be from 0 (nothing kept) to 1 (all kept), got {given.share}")
    torch.set_num_threads(1)
    found, balances = [], []
    for net, share in product(given.models, given.share):
        about, own = measured(net, given.chunks, given.size, share, given.rounds)
        found.append(about)
        balances.append(own)
    results = [summary(found, notes(balances, given.share)), *(table(a, given.size) for a in found)]
    samples = {
        f"{a.net}, {a.cap / MEGA:.2f} MiB: {label(c)}, M={c.chunks}": s for a in found for c, s in a.samples.items()
    }
    report("equal_memory", results, samples)
    figure(found, given.size)


if __name__ == "__main__":
    main()
