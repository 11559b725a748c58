"""Who was busy when, and what it held: one mini-batch, as it was run or as it is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from gpipe import trace
from gpipe.actions import F, R
from gpipe.spans import Floats, Flush, Level, Memory, Span, Spans, Transfer, Transfers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Flush", "Level", "Memory", "Span", "Spans", "Timeline", "Transfer", "Transfers"]


@dataclass(frozen=True)
class Timeline:
    """What every worker did over one mini-batch, from ``simulate`` or from a run.

    Shares are of the makespan, 0 to 1. Of a run, an action on the CPU lasts while its worker computes; on an
    accelerator from when the device comes to it until it is done, so that a device which waits for more to be launched
    in the middle of an action counts as busy. Several devices' times are brought to the host's clock.

    Attributes:
        workers: Per worker its spans in order. Any sequences may be given; they are held as ``Spans``.
        transfers: The messages between stages that took time; empty where they are not known.
        flush: What workers did after their last action; empty where that is not known.
        memory: Per stage the bytes it held over time; empty where they are not known, as those of other ranks.
    """

    workers: tuple[Sequence[Span], ...]
    transfers: Sequence[Transfer] = ()
    flush: tuple[Flush, ...] = ()
    memory: tuple[Memory, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "workers", tuple(Spans.of(spans) for spans in self.workers))
        object.__setattr__(self, "transfers", Transfers.of(self.transfers))

    @cached_property
    def start(self) -> float:
        """Seconds at which the first action starts; 0 if there is none."""
        return min((float(spans.start.min()) for spans in self._workers if len(spans)), default=0.0)

    @cached_property
    def end(self) -> float:
        """Seconds at which the last action, or what follows it at the flush, ends."""
        ends = [float(spans.end.max()) for spans in self._workers if len(spans)]
        return max(ends + [part.end for part in self.flush], default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds in which some half of the schedule ran; the caller's own time between the halves does not count."""
        return sum(end - start for start, end in self._halves)

    @property
    def busy(self) -> tuple[float, ...]:
        """Per worker the share it spent computing: its actions, and the optimizer."""
        seconds = [float((spans.end - spans.start).sum()) for spans in self._workers]
        for part in self.flush:
            if part.name == "optimizer":
                seconds[part.worker] += part.end - part.start
        return self._shares(seconds)

    @property
    def idle(self) -> tuple[float, ...]:
        """Per worker the share it computed nothing."""
        return tuple(1 - busy for busy in self.busy) if self.makespan else self.busy

    @property
    def bubble(self) -> float:
        """The idle share of workers x makespan, 0 to 1."""
        return sum(self.idle) / len(self.workers) if self.workers else 0.0

    @property
    def recompute(self) -> tuple[float, ...]:
        """Per worker the share it spent computing activations again; a part of ``busy``."""
        recomputes = (spans.kind == R for spans in self._workers)
        return self._shares([float((s.end - s.start)[r].sum()) for s, r in zip(self._workers, recomputes, strict=True)])

    @property
    def communication(self) -> tuple[float, ...]:
        """Per worker the share it computed nothing while a message was on its way to it, or gradients were reduced.

        A part of ``idle``; messages that travel while the worker computes cost nothing and do not count.
        """
        transfers = Transfers.of(self.transfers)
        target = self._hosts[transfers.target]
        by_target = np.argsort(target, kind="stable")
        bounds = np.searchsorted(target[by_target], np.arange(len(self.workers) + 1)).tolist()
        seconds = []
        for spans, (first, end) in zip(self._workers, pairwise(bounds), strict=True):
            mine = by_target[first:end]
            either = _covered(
                np.concatenate([spans.start, transfers.start[mine]]), np.concatenate([spans.end, transfers.end[mine]])
            )
            seconds.append(either - _covered(spans.start, spans.end))
        for part in self.flush:
            if part.name == "all_reduce":
                seconds[part.worker] += part.end - part.start
        return self._shares(seconds)

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        """Per stage the most bytes it held; empty where that is not known."""
        return tuple(memory.peak for memory in self.memory)

    @property
    def worker_memory(self) -> tuple[Memory, ...]:
        """Per worker the bytes its stages held together over time; empty where that is not known."""
        if not self.memory:
            return ()
        hosted = ([m for k, m in enumerate(self.memory) if self._hosts[k] == w] for w in range(len(self.workers)))
        return tuple(Memory.total(parts) for parts in hosted)

    def render(self, width: int = 100) -> str:
        """One line a worker, ``width`` characters for the whole time; the number is the micro-batch.

        F forward, R recompute, B backward, I input gradient, W weight gradient; ahead of them the stage where a worker
        hosts several.
        """
        if not any(map(len, self.workers)):
            return ""
        scale = width / max(self.end - self.start, 1e-9)
        return "\n".join(
            f"worker {w} |{self._row(w, scale, width)}| {busy:4.0%} busy" for w, busy in enumerate(self.busy)
        )

    def to_chrome_trace(self, path: str | PathLike[str]) -> None:
        """Write the timeline in Trace Event Format, which https://ui.perfetto.dev and chrome://tracing open.

        A track a worker, the messages between stages, and a curve of bytes for every stage; times start at 0.
        """
        trace.write(path, self)

    def figure(self, other: Timeline | None = None, title: str | None = None) -> Figure:
        """Draw a bar for every action, a row a worker.

        Args:
            other: A second timeline, drawn below on the same axis of time, both from their first action on:
                ``predicted.figure(measured)``.
            title: Stands above.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from gpipe.figure import gantt

        return gantt({"": self} if other is None else {"predicted": self, "measured": other}, title)

    @property
    def _workers(self) -> tuple[Spans, ...]:
        return self.workers  # type: ignore[return-value]  # __post_init__ made them so

    @cached_property
    def _hosts(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The worker of every stage."""
        stages = [spans.stage.max() + 1 for spans in self._workers if len(spans)]
        hosts = np.zeros(max([*stages, len(self.memory)]), dtype=np.int64)
        for worker, spans in enumerate(self._workers):
            hosts[spans.stage] = worker
        return hosts

    @cached_property
    def _halves(self) -> list[tuple[float, float]]:
        forward = [(s.start[s.kind == F], s.end[s.kind == F]) for s in self._workers]
        others = [(s.start[s.kind != F], s.end[s.kind != F]) for s in self._workers]
        others += [(np.array([part.start]), np.array([part.end])) for part in self.flush]
        ranges = [
            (min(float(start.min()) for start, _ in half), max(float(end.max()) for _, end in half))
            for half in ([part for part in parts if len(part[0])] for parts in (forward, others))
            if half
        ]
        if len(ranges) == 2 and ranges[1][0] < ranges[0][1]:
            return [(min(ranges)[0], max(end for _, end in ranges))]
        return ranges

    def _shares(self, seconds: Sequence[float]) -> tuple[float, ...]:
        total = self.makespan
        return tuple(part / total if total else 0.0 for part in seconds)

    def _row(self, worker: int, scale: float, width: int) -> str:
        spans = self._workers[worker]
        several = len(np.unique(spans.stage)) > 1
        parts = [(str(a) if several else f"{a.kind}{a.micro_batch}", start, end) for a, start, end in spans]
        parts += [(part.name, part.start, part.end) for part in self.flush if part.worker == worker]
        row = [" "] * width
        for text, start, end in parts:
            left, right = int((start - self.start) * scale), int((end - self.start) * scale)
            for i in range(left, min(right, width)):
                row[i] = text[i - left] if i - left < len(text) else "-"
        return "".join(row)


def _covered(start: Floats, end: Floats) -> float:
    """Seconds that are in at least one of the intervals."""
    order = np.argsort(start)
    start, end = start[order], end[order]
    reached = np.concatenate([start[:1], np.maximum.accumulate(end)[:-1]])
    return float(np.maximum(end - np.maximum(start, reached), 0).sum())
