"""On one accelerator, what do stages that share it cost against plain PyTorch with the same micro-batches?

Run: python -m benchmarks.one_device [--rounds 5] [--chunks 8] [--models Transformer ...] [--precision float32 bfloat16]

Torchgpipe runs where it is installed. ``--device cpu --size tiny`` shows that it works where there is no accelerator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from torch import nn

import gpipe
from benchmarks import harness
from benchmarks.bars import bars
from benchmarks.contenders import accumulate
from benchmarks.harness import Result, Samples, interleave, ratio, report
from benchmarks.match import missing_note, parser
from benchmarks.memory import MEGA
from benchmarks.models import NETS, Net, moved
from benchmarks.peers import checkpointed, missing, sharing_torchgpipe

QUESTION = "On one accelerator, what do stages that share it cost against plain PyTorch with the same micro-batches?"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What all contenders on one model have in common."""

    net: Net
    chunks: int
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def batch(self) -> tuple[Any, Any]:
        """Inputs and targets on the device."""
        inputs, targets = self.net.batch()
        return moved(inputs, self.device), moved(targets, self.device)

    def autocasting(self) -> AbstractContextManager[Any]:
        """Autocast, in bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def made(self) -> tuple[nn.Module, nn.Module]:
        """Model and loss on the device."""
        module, loss = self.net.made()
        return module.to(self.device), loss.to(self.device)


def plain(setting: Setting, recompute: bool) -> Step:
    """The loop over the micro-batches, each cell in torch.utils.checkpoint or none."""
    module, loss = checkpointed(setting.net, setting.chunks, setting.device) if recompute else setting.made()
    run = accumulate(module, *setting.batch, setting.chunks, loss)

    def step() -> None:
        loss.zero_grad()
        with setting.autocasting():
            run()

    return step


def piped(setting: Setting, stages: int, schedule: str, checkpoint: str) -> Step:
    """Our pipe, all of its stages on the device."""
    module, loss = setting.made()
    x, y = setting.batch
    options = {"devices": [setting.device] * stages, "chunks": setting.chunks, "checkpoint": checkpoint}
    pipe = gpipe.GPipe(module, **options, sample=x if stages > 1 else None)

    def step() -> None:
        pipe.zero_grad()
        loss.zero_grad()
        with setting.autocasting():
            pipe.train_step(x, y, loss, loss_over="micro_batch", schedule=schedule)

    return step


def torchgpipe(setting: Setting, stages: int, checkpoint: str) -> Step:
    """Torchgpipe's GPipe, all of its stages on the device."""
    run = sharing_torchgpipe(setting.net, setting.chunks, [setting.device] * stages, checkpoint, setting.batch)

    def step() -> None:
        with setting.autocasting():
            run()

    return step


PLAIN, CHECKPOINTED = "plain loop", "plain loop, checkpoint a cell"
WAYS: dict[str, Callable[[Setting], Step]] = {
    PLAIN: lambda s: plain(s, recompute=False),
    "GPipe K=1": lambda s: piped(s, 1, "gpipe", "never"),
    "GPipe K=2": lambda s: piped(s, 2, "gpipe", "never"),
    "GPipe K=2, one_f_one_b": lambda s: piped(s, 2, "one_f_one_b", "never"),
    "torchgpipe K=2": lambda s: torchgpipe(s, 2, "never"),
    CHECKPOINTED: lambda s: plain(s, recompute=True),
    "GPipe K=1, always": lambda s: piped(s, 1, "gpipe", "always"),
    "GPipe K=2, except_last": lambda s: piped(s, 2, "gpipe", "except_last"),
    "torchgpipe K=2, except_last": lambda s: torchgpipe(s, 2, "except_last"),
}


def timed(step: Step, device: torch.device) -> Callable[[], float]:
    """``step`` as a contender: seconds between two events on the device; on the CPU by the clock."""

    def by_events() -> float:
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize(device)
        begin.record()
        step()
        end.record()
        torch.accelerator.synchronize(device)
        return begin.elapsed_time(end) / 1e3

    def by_clock() -> float:
        begin = perf_counter()
        step()
        return perf_counter() - begin

    return by_clock if device.type == "cpu" else by_events


def peak_bytes(make: Callable[[Setting], Step], setting: Setting) -> int | None:
    """What the allocator gave at most in the second step, beside the data; None on the CPU."""
    if setting.device.type == "cpu":
        make(setting)()
        return None
    setting.batch  # noqa: B018
    gc.collect()
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_allocated(setting.device)
    step = make(setting)
    step()
    torch.accelerator.synchronize(setting.device)
    torch.accelerator.reset_peak_memory_stats(setting.device)
    step()
    torch.accelerator.synchronize(setting.device)
    return int(torch.accelerator.max_memory_allocated(setting.device)) - before


@dataclass(frozen=True)
class Measured:
    """One model in one precision.

    Attributes:
        title: Which.
        about: Its size, in words.
        rows: Of the mini-batch.
        samples: Of the contenders that ran.
        peaks: Their bytes.
        failed: Why the others did not.
    """

    title: str
    about: str
    rows: int
    samples: dict[str, Samples]
    peaks: dict[str, int | None]
    failed: dict[str, str]


def measured(title: str, setting: Setting, ways: Sequence[str], rounds: int) -> Measured:
    """Count the bytes of each contender alone, then time all in turns."""
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for way in ways:
        try:
            peaks[way] = peak_bytes(WAYS[way], setting)
        except (RuntimeError, TypeError, ValueError) as error:  # out of memory, or an old package on a new torch
            failed[way] = str(error).strip().splitlines()[0]
    steps = {way: timed(WAYS[way](setting), setting.device) for way in peaks}
    samples = interleave(steps, rounds)
    return Measured(title, setting.net.about, setting.net.rows, samples, peaks, failed)


def table(about: Measured) -> Result:
    """All contenders on one model."""
    rows = []
    for way, samples in about.samples.items():
        low, high = samples.spread
        peak = about.peaks[way]
        rows.append(
            [
                way,
                f"{about.rows / samples.median:.1f}",
                f"{1e3 * samples.median:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})",
                f"{ratio(samples, about.samples[PLAIN]):.3f}",
                "" if peak is None else f"{peak / MEGA:.0f}",
            ]
        )
    rows += [[way, "failed", why, "", ""] for way, why in about.failed.items()]
    columns = ["contender", "samples/s", "ms (quartiles)", "over the plain loop's", "peak MiB"]
    return Result(f"{about.title}: {about.about}", columns, rows)


def note(given: dict[str, str]) -> str:
    """How to read the tables, and what they do not show."""
    return (
        "A step is forward, loss on every micro-batch and backward of the same micro-batches for all; seconds between "
        "two events on the device, medians of runs in turns in one process; ratios are medians of those within a "
        "round. Peak: what the allocator gave in a contender's second step, alone on the device, data left out. Stages "
        "that share a device cannot compute more than it can: it shows what a pipeline costs, not what it gains. "
        + missing_note(given)
    ).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    options = parser(QUESTION, rounds=5, size="accelerator")
    options.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    options.add_argument("--device", type=torch.device, help="default: the accelerator")
    given = options.parse_args(argv)
    device = given.device or torch.accelerator.current_accelerator()
    if device is None:
        options.error("this machine has no accelerator: --device cpu --size tiny shows that the benchmark works")
    absent = {peer: why for peer, why in missing().items() if peer == "torchgpipe"}
    ways = [way for way in WAYS if not (absent and way.startswith("torchgpipe"))]
    found = []
    for net in given.models:
        for precision in given.precision:
            for chunks in given.chunks:
                setting = Setting(NETS[given.size][net], chunks, device, PRECISIONS[precision])
                found.append(measured(f"{net}, {precision}, M={chunks}", setting, ways, given.rounds))
    results = [table(about) for about in found]
    results[0] = Result(results[0].title, results[0].columns, results[0].rows, note(absent))
    report("one_device", results, {f"{a.title}: {way}": s for a in found for way, s in a.samples.items()})
    over = {way: [_over(about, way) for about in found] for way in ways if way != PLAIN}
    groups = [about.title.replace(", ", "\n") for about in found]
    bars(harness.RESULTS / "one_device.svg", "Seconds over the plain loop's", "ratio", groups, over, line=1.0)


def _over(about: Measured, way: str) -> float | None:
    return ratio(about.samples[way], about.samples[PLAIN]) if way in about.samples else None


if __name__ == "__main__":
    main()
