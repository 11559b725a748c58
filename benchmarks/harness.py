"""Interleaved timing: contenders take turns, disturbed samples are set aside, medians are quoted."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DISTURBED = 0.06  # share of the machine's time that other processes took during a sample


@dataclass
class Samples:
    """Seconds of one contender's runs, and for each the share of the machine that other processes took."""

    seconds: list[float] = field(default_factory=list)
    foreign: list[float] = field(default_factory=list)

    @property
    def clean(self) -> list[float]:
        """The undisturbed samples, or all of them if none is."""
        return [s for s, f in zip(self.seconds, self.foreign, strict=True) if f < DISTURBED] or self.seconds

    @property
    def median(self) -> float:
        """Median of the undisturbed samples, in seconds."""
        return statistics.median(self.clean)

    @property
    def spread(self) -> tuple[float, float]:
        """Their quartiles, in seconds: a quarter is below the first, a quarter above the second."""
        if len(self.clean) == 1:
            return self.clean[0], self.clean[0]
        low, _, high = statistics.quantiles(self.clean, n=4, method="inclusive")
        return low, high


def ratio(a: Samples, b: Samples) -> float:
    """Seconds of ``a`` over those of ``b``, the median over the rounds: what slows the machine for a while slows both.

    Rounds in which one of them was disturbed do not count, unless all were.
    """
    rounds = list(zip(a.seconds, b.seconds, map(max, a.foreign, b.foreign), strict=True))
    quiet = [x / y for x, y, foreign in rounds if foreign < DISTURBED]
    return statistics.median(quiet or [x / y for x, y, _ in rounds])


def contest(ours: Sequence[Samples], theirs: Sequence[Samples]) -> float:
    """Seconds of their best over those of our best, the median over the rounds.

    Which is the best is told by the other rounds: luck in a round does not choose what that round is quoted of.
    """
    rounds = range(len(ours[0].seconds))
    pairs = [(_best_but_for(r, theirs), _best_but_for(r, ours)) for r in rounds]
    kept = [(a.seconds[r] / b.seconds[r], max(a.foreign[r], b.foreign[r])) for r, (a, b) in enumerate(pairs)]
    return statistics.median([share for share, foreign in kept if foreign < DISTURBED] or [share for share, _ in kept])


def _best_but_for(r: int, contenders: Sequence[Samples]) -> Samples:
    return min(contenders, key=lambda s: statistics.median(s.seconds[:r] + s.seconds[r + 1 :] or s.seconds))


def interleave(contenders: Mapping[str, Callable[[], float]], rounds: int, *, quiet: bool = True) -> dict[str, Samples]:
    """Run every contender once a round, in alternating order, after a round of warm-up.

    Args:
        contenders: Per name a function that runs once and gives its seconds.
        rounds: Counted rounds.
        quiet: Wait before each round until other processes leave the processors alone.
    """
    samples = {name: Samples() for name in contenders}
    names = list(contenders)
    for r in range(rounds + 1):
        if quiet:
            _wait_for_quiet()
        for name in names if r % 2 else reversed(names):
            before, start = _busy(), time.perf_counter()
            own = _own()
            seconds = contenders[name]()
            wall = time.perf_counter() - start
            foreign = max(0.0, _busy() - before - (_own() - own)) / wall / (os.cpu_count() or 1)
            if r:
                samples[name].seconds.append(seconds)
                samples[name].foreign.append(foreign)
    return samples


def _wait_for_quiet(limit: float = 20.0) -> None:
    """Return once other processes have left the machine alone for a quarter of a second, or after ``limit`` seconds."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        busy, own, start = _busy(), _own(), time.perf_counter()
        time.sleep(0.25)
        foreign = (_busy() - busy) - (_own() - own)
        if foreign < DISTURBED * (time.perf_counter() - start) * (os.cpu_count() or 1):
            return


def timed(run: Callable[[], Any]) -> Callable[[], float]:
    """``run`` as a contender timed from outside."""

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return once


def steady(run: Callable[[], Any]) -> Callable[[], float]:
    """The same, timed the second time in a row: memory and caches are no longer those of the contender before."""
    again = timed(run)

    def once() -> float:
        run()
        return again()

    return once


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((x.split(":")[1].strip() for x in cpuinfo.read_text().splitlines() if "model name" in x), model)
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_versions("gpipe", "numpy", "torchgpipe", "fairscale"),
        "system": platform.system(),
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


@dataclass(frozen=True)
class Result:
    """One table of a report.

    Attributes:
        title: What it shows.
        columns: Their heads.
        rows: As they are to be read.
        note: What it does not show, or why it is as it is.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def report(
    name: str,
    results: Sequence[Result],
    samples: Mapping[str, Samples],
    figure: Figure | None = None,
) -> None:
    """Print tables, and save them with command, machine, every sample and the figure under ``benchmarks/results``.

    Args:
        name: Of the files.
        results: The tables.
        samples: Every contender's.
        figure: Of the results.
    """
    about = ", ".join(f"{k} {v}" for k, v in machine().items())
    command = shlex.join(["python", *sys.orig_argv[1:]])
    lines = [f"`{command}`; {about}"]
    for result in results:
        _print(result)
        lines += ["", f"## {result.title}", "", _line(result.columns), "|" + " --- |" * len(result.columns)]
        lines += [_line(row) for row in result.rows]
        lines += ["", result.note] if result.note else []
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    record = {
        "command": command,
        "machine": machine(),
        "results": [asdict(result) for result in results],
        "samples": {k: {"seconds": s.seconds, "foreign": s.foreign} for k, s in samples.items()},
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if figure is not None:
        with rc_context({"svg.hashsalt": "gpipe"}):  # the same file from the same results
            figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None})


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _print(result: Result) -> None:
    table = Table(title=result.title, caption=result.note or None)
    for i, column in enumerate(result.columns):
        table.add_column(column, justify="right" if i else "left")
    for row in result.rows:
        table.add_row(*row)
    Console(width=140).print(table)


def _busy() -> float:
    """Seconds all processors were busy since boot, stolen time included; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = (int(v) for v in stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / float(os.sysconf("SC_CLK_TCK"))


_children: dict[int, float] = {}


def own_process(pid: int) -> None:
    """Count a child process's time as the benchmark's own."""
    _children[pid] = 0.0


def _own() -> float:
    times = os.times()
    total = times.user + times.system
    for pid in _children:
        with suppress(OSError):  # one that has ended counts as it did last
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            _children[pid] = (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))
    return total + sum(_children.values())
