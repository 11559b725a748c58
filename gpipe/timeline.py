"""Who was busy when: the actions of one mini-batch with their times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpipe.schedule import Action


class Span(NamedTuple):
    """One action's computation, waiting excluded; seconds of ``time.perf_counter``."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every worker over one mini-batch.

    On an accelerator, times are those of launching the work, not of performing it.
    """

    workers: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds in which some half of the schedule ran; the caller's own time between the halves does not count."""
        return sum(end - start for start, end in self._halves())

    @property
    def busy(self) -> tuple[float, ...]:
        """Per worker the share of the makespan it spent computing, 0 to 1."""
        total = self.makespan
        return tuple(sum(s.end - s.start for s in spans) / total if total else 0.0 for spans in self.workers)

    def render(self, width: int = 100) -> str:
        """One line a worker, ``width`` characters for the whole time; a digit or letter is the micro-batch.

        Upper row of letters: F forward, R recompute, B backward.
        """
        spans = [s for worker in self.workers for s in worker]
        if not spans:
            return ""
        first = min(s.start for s in spans)
        scale = width / max(max(s.end for s in spans) - first, 1e-9)
        return "\n".join(
            f"worker {w} |{_row(spans, first, scale, width)}| {busy:4.0%} busy"
            for (w, spans), busy in zip(enumerate(self.workers), self.busy, strict=True)
        )

    def _halves(self) -> list[tuple[float, float]]:
        forward = [s for w in self.workers for s in w if s.action.kind == "F"]
        others = [s for w in self.workers for s in w if s.action.kind != "F"]
        ranges = [(min(s.start for s in h), max(s.end for s in h)) for h in (forward, others) if h]
        if len(ranges) == 2 and ranges[1][0] < ranges[0][1]:
            return [(min(ranges)[0], max(end for _, end in ranges))]
        return ranges


def _row(spans: Sequence[Span], first: float, scale: float, width: int) -> str:
    row = [" "] * width
    for span in spans:
        left, right = int((span.start - first) * scale), int((span.end - first) * scale)
        text = f"{span.action.kind}{span.action.micro_batch}"
        for i in range(left, min(right, width)):
            row[i] = text[i - left] if i - left < len(text) else "-"
    return "".join(row)
