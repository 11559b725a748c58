"""Timelines as a picture: a bar for every action, a row a worker. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from gpipe.actions import KINDS
from gpipe.spans import Spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gpipe.timeline import Timeline

_COLOURS = {"F": "#4c78a8", "R": "#b279a2", "B": "#54a24b", "I": "#8fd0c5", "W": "#f2b34c"}
_DARK_TEXT = ("I", "W")
_FLUSH = "#9d9d9d"
_WIDTH = 14.0  # inches
_CHARACTER = 0.006  # of the axis' width, at the font size of the numbers


def gantt(timelines: Mapping[str, Timeline], title: str | None) -> Figure:
    """Draw timelines one above the other on the same axis of time, each from its first action on.

    Args:
        timelines: By the label that stands above each.
        title: Of the whole figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install matplotlib, or 'gpipe[train]'") from error
    rows = [max(1, len(timeline.workers)) for timeline in timelines.values()]
    figure = Figure(figsize=(_WIDTH, 1.4 + sum(0.42 * n + 0.6 for n in rows)), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": rows})[:, 0]
    longest = max(timeline.end - timeline.start for timeline in timelines.values())
    for panel, (label, timeline) in zip(panels, timelines.items(), strict=True):
        _draw(panel, timeline, longest)
        words = f"{timeline.makespan:.4g} s, bubble {timeline.bubble:.1%}"
        panel.set_title(f"{label}: {words}" if label else words, loc="left", fontsize=10)
    panels[-1].set_xlabel("seconds")
    panels[-1].set_xlim(0, longest or 1)
    used = {int(code) for t in timelines.values() for spans in t.workers for code in np.unique(Spans.of(spans).kind)}
    patches = [Patch(color=_COLOURS[KINDS[code]], label=_word(code)) for code in sorted(used)]
    if any(timeline.flush for timeline in timelines.values()):
        patches.append(Patch(color=_FLUSH, label="flush"))
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    if title:
        figure.suptitle(title)
    return figure


def _draw(panel: Axes, timeline: Timeline, longest: float) -> None:
    for worker, spans in enumerate(timeline.workers):
        columns = Spans.of(spans)
        begin, lasting = columns.start - timeline.start, columns.end - columns.start
        for code, kind in enumerate(KINDS):
            here = columns.kind == code
            bars = list(zip(begin[here].tolist(), lasting[here].tolist(), strict=True))
            panel.broken_barh(bars, (worker - 0.4, 0.8), facecolor=_COLOURS[kind], edgecolor="white", linewidth=0.5)
        several = len(np.unique(columns.stage)) > 1
        for action, left, width in zip((a for a, _, _ in spans), begin.tolist(), lasting.tolist(), strict=True):
            text = f"{action.stage}.{action.micro_batch}" if several else str(action.micro_batch)
            if width > len(text) * _CHARACTER * longest:
                colour = "black" if action.kind in _DARK_TEXT else "white"
                panel.text(left + width / 2, worker, text, ha="center", va="center", fontsize=7, color=colour)
    for worker, _, start, end in timeline.flush:
        panel.broken_barh([(start - timeline.start, end - start)], (worker - 0.4, 0.8), facecolor=_FLUSH)
    panel.set_yticks(range(len(timeline.workers)), [f"worker {w}" for w in range(len(timeline.workers))])
    panel.set_ylim(max(1, len(timeline.workers)) - 0.5, -0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _word(code: int) -> str:
    return KINDS[code].name.capitalize().replace("_", " ")
