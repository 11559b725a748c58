"""Bars in groups, one figure a benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def bars(
    path: Path,
    title: str,
    unit: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    line: float | None = None,
) -> None:
    """Draw and save.

    Args:
        path: Of the picture; its ending says which kind.
        title: What it shows.
        unit: Of the bars' heights.
        groups: Names on the axis.
        series: By name one height for every group; None where there is none.
        line: A height to compare with.
    """
    figure = Figure(figsize=(max(8.0, 1.6 * len(groups)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.85 / max(1, len(series))
    for i, (name, heights) in enumerate(series.items()):
        left = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        axes.bar(left, [h or 0.0 for h in heights], width, label=name)
    if line is not None:
        axes.axhline(line, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(groups)), groups, fontsize="small")
    axes.set_ylabel(unit)
    axes.set_title(title)
    axes.legend(fontsize="small", ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path)
