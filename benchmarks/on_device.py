"""On these accelerators, are the promises kept, what does a pipeline cost, and are bytes and seconds as predicted?

Run: python -m benchmarks.on_device [--budget 540] [--out DIR] [--parts machine traps ...] [--simulated 4]

The first hour on a machine: needs torch, torchvision, numpy and pytest alone. What is wrong comes before what is slow,
every part is a process with a limit, and what a part has found is on the disk as soon as it has: rows.jsonl as they
come, summary.json and summary.md after every part, log.txt with all that was printed. Ends with 1 where a part that
looks for errors found one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_parts import correctness, memory, overlap, several, speed, traps
from benchmarks.device_parts.bench import PARTS, Bench, CannotRun
from gpipe.testing import accelerators
from gpipe.testing.accelerators import build

QUESTION = "On these accelerators, are the promises kept, what does a pipeline cost, and are predictions right?"

ROOT = Path(__file__).parents[1]
ORDER = (
    correctness.machine,
    traps.traps,
    correctness.exact,
    correctness.tests,
    correctness.world_of_one,
    correctness.pairs,
    overlap.simulated_step,
    speed.speed,
    several.several,
    speed.actions,
    speed.threads,
    memory.bytes_and_seconds,
    speed.alignment,
    speed.generators,
    memory.cap,
)
NAMES = [run.__name__ for run in ORDER]
SIMULATED_ALONE = overlap.simulated_step.__name__
LEAST = 8.0  # seconds: less is not enough to import torch and begin
SLOWER = 3.0  # simulated accelerators share the processor, perhaps with other work: so many times the limit

RAN, CANNOT, FAILED, CUT, NO_TIME = "ran", "cannot run", "failed", "cut off", "no time left"


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        name: Of the part.
        correctness: Whether it looks for errors.
        status: One of five words.
        why: Where it did not run to its end.
        seconds: It took.
        limit: It had.
        squeezed: Whether the budget left it less than a part of its kind has.
        rows: What it reported.
        tail: The last lines it printed, where it did not run to its end.
    """

    name: str
    correctness: bool
    status: str
    why: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    squeezed: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Rows that say that something is not right."""
        return [row for row in self.rows if row.get("right") is False]

    @property
    def error(self) -> bool:
        """Whether it found one, or ended as no part that looks for errors may."""
        hung = self.status == CUT and not self.squeezed
        return self.correctness and bool(self.wrong or self.status == FAILED or hung)


# --- a part's process -------------------------------------------------------------------------------------------------


def perform(name: str, simulated: int, rows: Path) -> int:
    """Run a part in this process; gives its exit code."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product: deterministic ones
    if simulated:
        torch.set_num_threads(1)  # bits depend on their number
        accelerators.start(simulated)
    kind = torch.accelerator.current_accelerator(check_available=True)
    with rows.open("a", encoding="utf-8") as file:
        bench = Bench(torch.device(kind.type if kind else "cpu", 0), simulated, file, name)
        try:
            if kind is None:
                raise CannotRun("this machine has no accelerator: --simulated 4 shows that the parts work")
            torch.zeros((), device=bench.device)  # CUDA has no generators before its first tensor
            PARTS[name].run(bench)
        except CannotRun as reason:
            bench.say(cannot_run=str(reason))
        except BaseException as error:
            traceback.print_exc()
            bench.say(raised=f"{type(error).__name__}: {error}".strip()[:400])
            return 1
    return 0


def run_part(name: str, limit: float, simulated: int, out: Path) -> Outcome:
    """Run a part in a process of its own, which is ended with its children after ``limit`` seconds."""
    rows, log = out / "rows.jsonl", out / "log.txt"
    begins = [path.stat().st_size if path.exists() else 0 for path in (rows, log)]
    command = [sys.executable, "-m", "benchmarks.on_device", "--part", name, "--simulated", str(simulated)]
    start = time.monotonic()
    code = ended([*command, "--rows", str(rows.resolve())], limit, log)
    squeezed = limit < limit_of(name, simulated)
    outcome = Outcome(name, PARTS[name].correctness, RAN, "", time.monotonic() - start, limit, squeezed)
    outcome.rows = written(rows, begins[0])
    found = next((row["cannot_run"] for row in outcome.rows if "cannot_run" in row), None)
    if code is None:
        outcome.status, outcome.why = CUT, f"at {limit:.0f} s, {'all that was left' if squeezed else 'its limit'}"
    elif code:
        raised = next((row["raised"] for row in outcome.rows if "raised" in row), "")
        outcome.status, outcome.why = FAILED, raised or f"exit code {code}"
    elif found is not None:
        outcome.status, outcome.why = CANNOT, found
    if outcome.status in (CUT, FAILED):
        with log.open("rb") as printed:
            printed.seek(begins[1])
            outcome.tail = printed.read().decode(errors="replace").splitlines()[-20:]
    return outcome


def ended(command: Sequence[str], limit: float, log: Path) -> int | None:
    """Run a command, what it prints added to ``log``; gives its exit code, or None where it was ended at its limit.

    Whatever it has started ends with it.
    """
    with log.open("ab") as printed:
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=printed, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):  # nobody of its process group is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def limit_of(name: str, simulated: int) -> float:
    """Seconds that a part has where the budget does not end before."""
    return PARTS[name].seconds * (SLOWER if simulated else 1.0)


def written(rows: Path, begin: int) -> list[dict[str, Any]]:
    """The rows from an offset on, but for one that was cut off while it was written."""
    found = []
    if rows.exists():
        with rows.open(encoding="utf-8") as file:
            file.seek(begin)
            for line in file:
                with suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
    for row in found:
        row.pop("part", None)
    return found


# --- the report -------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(map(shown, row)) + " |" for row in rows]


def shown(value: Any) -> str:
    """A value as a table has it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def cell(column: str, value: Any) -> Any:
    """What is wrong must be seen at a glance."""
    return value if column != "right" else "yes" if value else "WRONG"


def section(outcome: Outcome) -> list[str]:
    """What a part found, as lines of Markdown: rows of the same columns as one table."""
    about = PARTS[outcome.name].about
    why = f": {outcome.why}" if outcome.why else ""
    lines = ["", f"## {outcome.name}", "", about, "", f"{outcome.status} in {outcome.seconds:.0f} s{why}"]
    reported = [row for row in outcome.rows if not {"cannot_run", "raised"} & row.keys()]
    for columns, rows in groupby(reported, key=tuple[str, ...]):
        lines += ["", *table(columns, ([cell(column, row[column]) for column in columns] for row in rows))]
    if outcome.tail:
        lines += ["", "```", *outcome.tail, "```"]
    return lines


def publish(outcomes: Sequence[Outcome], about: dict[str, Any], out: Path) -> None:
    """Write both summaries anew."""
    record = {**about, "error": any(o.error for o in outcomes), "parts": [asdict(o) for o in outcomes]}
    rows = [[o.name, o.status, o.seconds, verdict(o), o.why] for o in outcomes]
    facts = next((row for o in outcomes if o.name == "machine" for row in o.rows), {})
    devices = about["devices"] + (f": {facts['count']} x {facts['name']}" if "name" in facts else "")
    lines = [f"`{about['command']}`; torch {about['torch']}, Python {about['python']}, {devices}", ""]
    lines += table(["part", "status", "seconds", "found", "why"], rows)
    lines += [line for outcome in outcomes for line in section(outcome)]
    for name, text in (("summary.json", json.dumps(record, indent=1)), ("summary.md", "\n".join(lines))):
        whole = out / f".{name}"
        whole.write_text(text + "\n", encoding="utf-8")
        whole.replace(out / name)


def verdict(outcome: Outcome) -> str:
    """What a part found, in a few words."""
    checks = sum("right" in row for row in outcome.rows)
    if outcome.wrong:
        return f"{len(outcome.wrong)} of {checks} WRONG"
    if outcome.error:
        return "WRONG: did not end as it must"
    return f"{checks} right" if checks else ""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read them."""
    parts = []
    for name in NAMES:
        part = PARTS[name]
        parts.append(f"  {name:18} {part.seconds:4.0f} s  {'errors' if part.correctness else '':6}  {part.about}")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_device",
        description=QUESTION,
        epilog="parts, in their order, with their limits:\n" + "\n".join(parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all; what comes late gets what is left")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/on_device"), help="folder of the results; default %(default)s"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=NAMES, metavar="PART", help="these alone; default: all that apply"
    )
    parser.add_argument(
        "--simulated", type=int, default=0, metavar="N", help="on N simulated accelerators, small sizes"
    )
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)  # what a part's process is started with
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; gives 1 where one that looks for errors found one, 0 otherwise."""
    given = arguments(argv)
    if given.part:
        return perform(given.part, given.simulated, given.rows)
    if given.simulated:
        build.load()  # which may take a minute, and is no part's
    given.out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "log.txt", "summary.json", "summary.md"):
        (given.out / name).unlink(missing_ok=True)
    about = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": f"{given.simulated} simulated accelerators" if given.simulated else "real accelerators",
    }
    end, outcomes = time.monotonic() + given.budget, list[Outcome]()
    apply = [name for name in NAMES if given.simulated or name != SIMULATED_ALONE]
    for name in sorted(given.parts or apply, key=NAMES.index):
        limit = min(limit_of(name, given.simulated), end - time.monotonic())
        late = Outcome(name, PARTS[name].correctness, NO_TIME, f"the budget of {given.budget:g} s is spent")
        outcomes.append(late if limit < LEAST else run_part(name, limit, given.simulated, given.out))
        publish(outcomes, about, given.out)
        print("\n".join(section(outcomes[-1])), flush=True)
    print("\n" + (given.out / "summary.md").read_text(encoding="utf-8").split("\n\n## ")[0].strip())
    return int(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's processes are ended too
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if "--part" in sys.argv:
        os._exit(code)  # a trap may have left threads that never end
    sys.exit(code)
