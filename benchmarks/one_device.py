"""On one accelerator, what do stages that share it cost against plain PyTorch with the same micro-batches?

Run: python -m benchmarks.one_device [--rounds 5] [--chunks 8] [--models Transformer ...] [--precision float32 bfloat16]

Torchgpipe runs where it is installed. ``--device cpu --size tiny`` shows that it works where there is no accelerator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import harness
from benchmarks.bars import bars
from benchmarks.flat import FlatCell
from benchmarks.harness import Result, Samples, interleave, ratio, report, steady
from benchmarks.match import missing_note, parser
from benchmarks.memory import MEGA
from benchmarks.models import NETS
from benchmarks.peers import missing, sharing_torchgpipe
from benchmarks.sharing import PRECISIONS, Setting, Step, piped, plain

QUESTION = "On one accelerator, what do stages that share it cost against plain PyTorch with the same micro-batches?"


def torchgpipe(setting: Setting, stages: int, checkpoint: str) -> Step:
    """Torchgpipe's GPipe, all of its stages on the device."""
    devices = [setting.device] * stages
    pipe, loss, step = sharing_torchgpipe(setting.net, setting.chunks, devices, checkpoint, setting.batch)
    setting.autocasting([loss, *(m for m in pipe.modules() if isinstance(m, FlatCell))])  # its threads know no context
    return step


PLAIN, TWO = "plain loop", "GPipe K=2"
WAYS: dict[str, Callable[[Setting], Step]] = {
    PLAIN: lambda s: plain(s, recompute=False),
    "GPipe K=1": lambda s: piped(s, 1, "gpipe", "never"),
    "GPipe K=1, one_f_one_b": lambda s: piped(s, 1, "one_f_one_b", "never"),
    TWO: lambda s: piped(s, 2, "gpipe", "never"),
    "GPipe K=2, one_f_one_b": lambda s: piped(s, 2, "one_f_one_b", "never"),
    "torchgpipe K=2": lambda s: torchgpipe(s, 2, "never"),
    "plain loop, checkpoint a cell": lambda s: plain(s, recompute=True),
    "GPipe K=1, always": lambda s: piped(s, 1, "gpipe", "always"),
    "GPipe K=2, except_last": lambda s: piped(s, 2, "gpipe", "except_last"),
    "torchgpipe K=2, except_last": lambda s: torchgpipe(s, 2, "except_last"),
}


def timed(step: Step, device: torch.device) -> Callable[[], float]:
    """``step`` as a contender: the second of two, seconds between events on the device; on the CPU by the clock."""

    def by_events() -> float:
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        step()  # whoever ran before left the allocator's blocks in other sizes
        torch.accelerator.synchronize(device)
        begin.record()
        step()
        end.record()
        torch.accelerator.synchronize(device)
        return begin.elapsed_time(end) / 1e3

    return steady(step) if device.type == "cpu" else by_events


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

    def over_plain(self, way: str) -> float | None:
        """Seconds over the plain loop's, where both ran."""
        ran = way in self.samples and PLAIN in self.samples
        return ratio(self.samples[way], self.samples[PLAIN]) if ran else None


def measured(title: str, setting: Setting, ways: Sequence[str], rounds: int) -> Measured:
    """Count the bytes of each contender alone, then time all in turns."""
    failed: dict[str, str] = {}

    def tried(way: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:  # out of memory, or whatever an old package does on a new torch
            failed[way] = f"{type(error).__name__}: {error}".strip().splitlines()[0]

    for way in (PLAIN, TWO):  # the libraries' own memory, which is taken once, is nobody's
        tried(way, partial(peak_bytes, WAYS[way], setting))
    peaks = {way: tried(way, partial(peak_bytes, WAYS[way], setting)) for way in ways}
    steps = {way: tried(way, partial(WAYS[way], setting)) for way in ways if way not in failed}
    for way in [way for way in steps if way not in failed]:  # all models are there at once now
        tried(way, steps[way])
    able = {way: timed(step, setting.device) for way, step in steps.items() if way not in failed}
    samples = interleave(able, rounds, quiet=setting.device.type == "cpu")
    return Measured(title, setting.net.about, setting.net.rows, samples, peaks, failed)


def table(about: Measured) -> Result:
    """All contenders on one model."""
    rows = []
    for way, samples in about.samples.items():
        low, high = samples.spread
        peak, over = about.peaks[way], about.over_plain(way)
        rows.append(
            [
                way,
                f"{about.rows / samples.median:.1f}",
                f"{1e3 * samples.median:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})",
                "" if over is None else f"{over:.3f}",
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
        "two events on the device, of the second of two steps, medians of runs in turns in one process; ratios are "
        "medians of those within a round. bfloat16 is autocast in forward and loss, weights cast for each micro-batch; "
        "float32 convolutions may use TF32, as is torch's default. Peak: what the allocator gave in a contender's "
        "second step, alone on the device, data left out; the plain loop and K=1 under 1F1B hold one micro-batch's "
        "graph, GPipe's schedule all M. Stages that share a device cannot compute more than it can: it shows what a "
        "pipeline costs, not what it gains. " + missing_note(given)
    ).strip()


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments and measure."""
    options = parser(QUESTION, rounds=5, size="accelerator")
    options.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    options.add_argument("--device", type=torch.device, help="default: the accelerator")
    options.add_argument("--name", default="one_device", help="of the files of results")
    given = options.parse_args(argv)
    device = given.device or torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        options.error("this machine has no accelerator: --device cpu --size tiny shows that the benchmark works")
    absent = {peer: why for peer, why in missing().items() if peer == "torchgpipe"}
    ways = [way for way in WAYS if not (absent and way.startswith("torchgpipe"))]
    if device.type != "cpu" and device.index is not None:
        torch.accelerator.set_device_index(device)
    found: list[Measured] = []
    try:
        for net, precision, chunks in product(given.models, given.precision, given.chunks):
            setting = Setting(NETS[given.size][net], chunks, device, PRECISIONS[precision])
            found.append(measured(f"{net}, {precision}, M={chunks}", setting, ways, given.rounds))
    finally:
        if found:
            publish(given.name, found, note(absent))


def publish(name: str, found: Sequence[Measured], said: str) -> None:
    """Report and draw what has been measured."""
    first, *others = (table(about) for about in found)
    results = [Result(first.title, first.columns, first.rows, said), *others]
    report(name, results, {f"{a.title}: {way}": s for a in found for way, s in a.samples.items()})
    ways = dict.fromkeys(way for about in found for way in about.samples if way != PLAIN)
    over = {way: [about.over_plain(way) for about in found] for way in ways}
    groups = [about.title.replace(", ", "\n") for about in found]
    bars(harness.RESULTS / f"{name}.svg", "Seconds over the plain loop's", "ratio", groups, over, line=1.0)


if __name__ == "__main__":
    main()
