"""On these accelerators, are the promises kept, what does a pipeline cost, and are bytes and seconds as predicted?

Run: python -m benchmarks.on_device [--budget 540] [--out DIR] [--parts machine traps ...] [--simulated 4]

The first hour on a machine: needs torch, torchvision, numpy and pytest alone. What is wrong comes before what is slow,
every part is a process with a limit, and what a part has found is on the disk as soon as it has: rows.jsonl as they
come, summary.json and summary.md after every part, log.txt with all that was printed. Ends with 1 where a part that
looks for errors found one, else with 2 where one was not run to its end, and with 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
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
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_parts import correctness, memory, overlap, several, speed, traps
from benchmarks.device_parts.bench import PARTS, Bench, CannotRun, NoAccelerator
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
NO_ACCELERATOR, INTERRUPTED = "no accelerator", "interrupted"

ENDINGS = {"cannot_run": CANNOT, "no_accelerator": NO_ACCELERATOR, "raised": FAILED}
"""What a part's last row says that it came to, by the row's key."""

LAST = 20
"""Lines of a part that did not run to its end."""

CRASHES = ("terminate called after", "Fatal Python error")
"""What C++ or Python prints first in a process that crashes."""


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        name: Of the part.
        correctness: Whether it looks for errors.
        status: One of the words above.
        why: Where it did not run to its end.
        seconds: It took.
        limit: It had.
        squeezed: Whether the budget left it less than a part of its kind has.
        rows: What it reported.
        tail: The last lines it printed, or the first of its crash, where it did not run to its end.
        named: Whether it was asked for by its name.
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
    named: bool = False

    @property
    def checks(self) -> int:
        """How many things were looked at for whether they are right; a test that passed has no row of its own."""
        return sum(("right" in row) + row.get("passed", 0) for row in self.rows)

    @property
    def wrong(self) -> list[dict[str, Any]]:
        """Rows that say that something is not right."""
        return [row for row in self.rows if row.get("right") is False]

    @property
    def error(self) -> bool:
        """Whether it found one, or ended as no part that looks for errors may."""
        hung = self.status == CUT and not self.squeezed
        return self.correctness and bool(self.wrong or self.status == FAILED or hung)

    @property
    def unchecked(self) -> bool:
        """Whether it would look for errors and was not run to its end, or there is nothing to look at."""
        no_time = self.status == NO_TIME or (self.status == CUT and self.squeezed)
        unable = self.status == INTERRUPTED or (self.status == CANNOT and self.named)
        return self.status == NO_ACCELERATOR or (self.correctness and (no_time or unable))


# --- a part's process -------------------------------------------------------------------------------------------------


def perform(name: str, simulated: int, rows: Path) -> int:
    """Run a part in this process; gives its exit code."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product: deterministic ones
    faulthandler.enable()
    with rows.open("a", encoding="utf-8") as file:
        bench = Bench(torch.device("cpu"), simulated, file, name)
        try:
            PARTS[name].run(replace(bench, device=first_device(simulated)))
        except NoAccelerator as reason:
            bench.say(no_accelerator=str(reason))
        except CannotRun as reason:
            bench.say(cannot_run=str(reason))
        except BaseException as error:
            traceback.print_exc()
            bench.say(raised=f"{type(error).__name__}: {error}".strip()[:400])
            return 1
    return 0


def first_device(simulated: int) -> torch.device:
    """The first accelerator, ready.

    Raises:
        NoAccelerator: There is none.
        RuntimeError: The simulated ones cannot be started.
    """
    if simulated:
        torch.set_num_threads(1)  # bits depend on their number
        accelerators.start(simulated)
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        raise NoAccelerator("this machine has no accelerator: --simulated 4 shows that the parts work")
    device = torch.device(kind.type, 0)
    torch.zeros((), device=device)  # CUDA has no generators before its first tensor
    return device


def run_part(name: str, limit: float, simulated: int, out: Path) -> Outcome:
    """Run a part in a process of its own, which is ended with its children after ``limit`` seconds, or by Ctrl-C."""
    rows, log = out / "rows.jsonl", out / "log.txt"
    begins = [path.stat().st_size if path.exists() else 0 for path in (rows, log)]
    command = [sys.executable, "-m", "benchmarks.on_device", "--part", name, "--simulated", str(simulated)]
    start, code, interrupted = time.monotonic(), None, False
    try:
        code = ended([*command, "--rows", str(rows.resolve())], limit, log)
    except KeyboardInterrupt:
        interrupted = True
    squeezed = limit < limit_of(name, simulated)
    outcome = Outcome(name, PARTS[name].correctness, RAN, "", time.monotonic() - start, limit, squeezed)
    found = written(rows, begins[0])
    outcome.rows = [row for row in found if "doing" not in row]
    outcome.status, outcome.why = ending(code, found)
    if interrupted:
        outcome.status = INTERRUPTED
    elif outcome.status == CUT:
        outcome.why = f"at {limit:.0f} s, {'all that was left' if squeezed else 'its limit'}{outcome.why}"
    if outcome.status in (CUT, FAILED, INTERRUPTED):
        outcome.tail = last_lines(log, begins[1])
    return outcome


def ending(code: int | None, rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What became of a part, as a word, and why: by its exit code, None where it was ended, and by its rows."""
    doing = next((row["doing"] for row in reversed(rows) if "doing" in row), None)
    where = f", in {doing}" if doing else ""
    said = next(((word, row[key]) for row in rows for key, word in ENDINGS.items() if key in row), None)
    if code is None:
        return CUT, where
    if said:
        return said[0], said[1] + (where if said[0] == FAILED else "")
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        return FAILED, f"ended by {name}{where}"
    return (FAILED, f"exit code {code}{where}") if code else (RAN, "")


def last_lines(log: Path, begin: int) -> list[str]:
    """The last lines from an offset on; where the process crashed, the line before that and what follows it."""
    with log.open("rb") as printed:
        printed.seek(begin)
        lines = printed.read().decode(errors="replace").splitlines()
    crash = next((k for k, line in enumerate(lines) if any(words in line for words in CRASHES)), None)
    return lines[-LAST:] if crash is None else lines[max(0, crash - 1) :][:LAST]


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
    reported = [row for row in outcome.rows if not ENDINGS.keys() & row.keys()]
    for columns, rows in groupby(reported, key=tuple[str, ...]):
        lines += ["", *table(columns, ([cell(column, row[column]) for column in columns] for row in rows))]
    if outcome.tail:
        lines += ["", "```", *outcome.tail, "```"]
    return lines


def publish(outcomes: Sequence[Outcome], about: dict[str, Any], out: Path) -> None:
    """Write both summaries anew."""
    found = {"error": any(o.error for o in outcomes), "unchecked": [o.name for o in outcomes if o.unchecked]}
    record = {**about, **found, "parts": [asdict(o) for o in outcomes]}
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
    if outcome.wrong:
        return f"{len(outcome.wrong)} of {outcome.checks} WRONG"
    if outcome.error:
        return "WRONG: did not end as it must"
    return f"{outcome.checks} right" if outcome.checks else ""


def verdict_of_all(outcomes: Sequence[Outcome], out: Path) -> tuple[int, str]:
    """The exit code, and the last line that is printed; none where all was looked at and nothing is wrong."""
    if outcomes and outcomes[-1].status == INTERRUPTED:
        return 130, f"interrupted in {outcomes[-1].name}: what was found before is in {out}"
    code = 1 if any(outcome.error for outcome in outcomes) else 0
    unchecked = [outcome for outcome in outcomes if outcome.unchecked]
    if not unchecked:
        return code, ""
    if unchecked[-1].status == NO_ACCELERATOR:
        return code or 2, f"nothing was checked: {unchecked[-1].why}"
    names = ", ".join(f"{outcome.name} ({outcome.status})" for outcome in unchecked)
    late = any(outcome.status != CANNOT for outcome in unchecked)
    more = "; give a longer --budget, or name fewer --parts" if late else ""
    return code or 2, f"not checked to the end: {names}{more}"


# --- the command ------------------------------------------------------------------------------------------------------


def positive_seconds(text: str) -> float:
    """A number of seconds that ends."""
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, was given {text}")
    return seconds


def device_count(text: str) -> int:
    """A number of devices, 0 for the real ones."""
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"expected 1 or more, or 0 for real accelerators, was given {text}")
    return count


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read them."""
    parts = []
    for name in NAMES:
        part = PARTS[name]
        parts.append(f"  {name:18} {part.seconds:4.0f} s  {'errors' if part.correctness else '':6}  {part.about}")
    limits = sum(part.seconds for name, part in PARTS.items() if name != SIMULATED_ALONE)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_device",
        description=QUESTION,
        epilog="parts, in their order, with their limits:\n"
        + "\n".join(parts)
        + f"\n\nOn real accelerators the limits are {limits:,.0f} s together, on simulated ones three times as many:"
        "\nwhere parts need more than the budget, late ones get less than their limit, or no time at all. Ends with 1"
        "\nwhere an error was found, else with 2 where a part that looks for errors did not run to its end.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=positive_seconds, default=540.0, help="seconds in all, after a build; default %(default)g"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/on_device"), help="folder of the results; default %(default)s"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=NAMES, metavar="PART", help="these alone; default: all that apply"
    )
    parser.add_argument(
        "--simulated", type=device_count, default=0, metavar="N", help="on N simulated accelerators, small sizes"
    )
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)  # what a part's process is started with
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; gives 1, 2 or 130 as the module says, 0 otherwise."""
    given = arguments(argv)
    if given.part:
        return perform(given.part, given.simulated, given.rows)
    if given.simulated:
        try:
            build.load()  # which may take a minute, and is no part's
        except build.BuildError as error:
            print(f"nothing was checked: {error}", flush=True)
            return 2
    given.out.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "log.txt", "summary.json", "summary.md"):
        (given.out / name).unlink(missing_ok=True)
    code, last = verdict_of_all(run_parts(given), given.out)
    print("\n" + (given.out / "summary.md").read_text(encoding="utf-8").split("\n\n## ")[0].strip())
    if last:
        print("\n" + last, flush=True)
    return code


def run_parts(given: argparse.Namespace) -> list[Outcome]:
    """Run those that apply one after the other, and report each; without an accelerator the first is the last."""
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
        if limit < LEAST:
            outcome = Outcome(name, PARTS[name].correctness, NO_TIME, f"the budget of {given.budget:g} s is spent")
        else:
            print(f"\n{name} begins, and has {limit:.0f} s", flush=True)
            outcome = run_part(name, limit, given.simulated, given.out)
        outcome.named = bool(given.parts)
        outcomes.append(outcome)
        publish(outcomes, about, given.out)
        print("\n".join(section(outcome)), flush=True)
        if outcome.status in (INTERRUPTED, NO_ACCELERATOR):
            break
    return outcomes


if __name__ == "__main__":
    if "--part" in sys.argv:
        code = main()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a trap may have left threads that never end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's processes are ended too
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # between two parts
        sys.exit(130)
