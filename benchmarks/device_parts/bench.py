"""A part: what it is run on, what it reports, and how it times."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import nn

from benchmarks.models import layers
from gpipe.testing import accelerators


class CannotRun(Exception):
    """Why a part has nothing to look at here."""


class NoAccelerator(CannotRun):
    """Why no part has."""


@dataclass(frozen=True)
class Bench:
    """What a part is run on, and where its rows go.

    Attributes:
        device: The first accelerator.
        simulated: How many simulated accelerators there are; 0: they are real.
        rows: One JSON object a line, written as soon as it is known.
        name: Of the part, which every row begins with.
    """

    device: torch.device
    simulated: int
    rows: TextIO
    name: str

    def say(self, **values: Any) -> None:
        """Report a row."""
        print(json.dumps({"part": self.name, **values}, default=str), file=self.rows, flush=True)

    def check(self, what: str, right: bool, **values: Any) -> None:
        """Report whether something is as it must be."""
        self.say(what=what, right=bool(right), **values)

    def begin(self, what: str | None) -> None:
        """Say what comes next, which is named where the process ends in it; None: nothing that has a name."""
        self.say(doing=what)

    def size(self, real: Any, simulated: Any) -> Any:
        """What fills a real accelerator, or what a simulated one does in no time."""
        return simulated if self.simulated else real

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        torch.accelerator.synchronize(self.device)

    def autocast(self, dtype: torch.dtype) -> torch.autocast:
        """Autocast to ``dtype`` on the device; none to float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def races(self) -> list[str]:
        """What the race detector of simulated accelerators has found since it was asked last."""
        if not self.simulated:
            return []
        found = accelerators.reports()
        accelerators.clear()
        return found


def encoder(count: int, width: int, dropout: float = 0.0) -> nn.Sequential:
    """Transformer encoder layers, always the same, heads of 64."""
    torch.manual_seed(0)
    module = layers(count, width, width // 64, 4 * width)
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = dropout
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = dropout
    return module


# --- parts by name ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        run: Looks, and reports.
        seconds: After which it is ended.
        correctness: What is not right in it is an error of the library.
        about: What it settles, in a line.
    """

    run: Callable[[Bench], None]
    seconds: float
    correctness: bool
    about: str


PARTS: dict[str, Part] = {}


def part(seconds: float, *, correctness: bool = False) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Let a function be a part, by its name; the first line of its docstring says what it settles."""

    def named(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        about = (run.__doc__ or "").splitlines()[0]
        PARTS[run.__name__] = Part(run, seconds, correctness, about)
        return run

    return named


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Milliseconds of every round of one contender.

    Attributes:
        done: Until the device had done all.
        launched: Until the host had launched all.
        taken: Bytes the allocator gave at most in any of them, above what it had given before.
    """

    done: list[float]
    launched: list[float]
    taken: int

    @property
    def ms(self) -> float:
        """The median."""
        return statistics.median(self.done)

    @property
    def launch_ms(self) -> float:
        """The median."""
        return statistics.median(self.launched)

    def over(self, other: Times) -> float:
        """Of the ratios within a round the median: what slows the device for a while slows both."""
        return statistics.median(a / b for a, b in zip(self.done, other.done, strict=True))


def in_turns(
    bench: Bench, steps: Mapping[str, Callable[[], object]], rounds: int = 5, warm: int = 2
) -> dict[str, Times]:
    """Time each of ``steps`` once a round, in turns, the device idle before; the first ``warm`` rounds do not count."""
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in steps}
    names = list(steps)
    for r in range(warm + rounds):
        for name in names if r % 2 else reversed(names):
            bench.synchronize()
            torch.accelerator.reset_peak_memory_stats(bench.device)
            before = torch.accelerator.memory_allocated(bench.device)
            start = time.perf_counter()
            steps[name]()
            launched = time.perf_counter() - start
            bench.synchronize()
            done = time.perf_counter() - start
            if r >= warm:
                taken = torch.accelerator.max_memory_allocated(bench.device) - before
                found[name].append((1e3 * done, 1e3 * launched, taken))
    columns = {name: tuple(zip(*of, strict=True)) for name, of in found.items()}
    return {name: Times(list(done), list(launched), max(taken)) for name, (done, launched, taken) in columns.items()}
