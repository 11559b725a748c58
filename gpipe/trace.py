"""Timelines as files in Trace Event Format, which Perfetto and chrome://tracing open.

The format: "Trace Event Format", Google 2016. Times are microseconds from the timeline's start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpipe.actions import KINDS

if TYPE_CHECKING:
    from gpipe.timeline import Timeline

_PIPELINE, _LINKS = 0, 1  # the two process tracks

Event = dict[str, Any]


def write(path: str | PathLike[str], timeline: Timeline) -> None:
    """Write the trace, an event a line."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for i, event in enumerate(events(timeline)):
            file.write((",\n" if i else "\n") + json.dumps(event))
        file.write("\n]}\n")


def events(timeline: Timeline) -> Iterator[Event]:
    """All events of the trace."""
    yield from _names(timeline)
    yield from _work(timeline)
    yield from _messages(timeline)
    for stage, memory in enumerate(timeline.memory):
        for time, held in memory:
            yield {
                "ph": "C",
                "pid": _PIPELINE,
                "name": f"stage {stage} bytes",
                "ts": _microseconds(timeline, time),
                "args": {"bytes": held},
            }


def _names(timeline: Timeline) -> Iterator[Event]:
    yield _metadata("process_name", _PIPELINE, name="pipeline")
    if timeline.transfers:
        yield _metadata("process_name", _LINKS, name="links")
    for worker, spans in enumerate(timeline.workers):
        stages = ", ".join(map(str, sorted({action.stage for action, _, _ in spans})))
        yield _metadata("thread_name", _PIPELINE, worker, name=f"worker {worker} (stage {stages})")
        yield _metadata("thread_sort_index", _PIPELINE, worker, sort_index=worker)


def _metadata(what: str, process: int, thread: int = 0, **arguments: Any) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": arguments}


def _work(timeline: Timeline) -> Iterator[Event]:
    for worker, spans in enumerate(timeline.workers):
        for action, start, end in spans:
            arguments = {"stage": action.stage, "micro_batch": action.micro_batch}
            yield _complete(timeline, worker, str(action), _WORDS[action.kind], start, end, arguments)
    for worker, name, start, end in timeline.flush:
        yield _complete(timeline, worker, name, "flush", start, end, {})


def _complete(
    timeline: Timeline, worker: int, name: str, category: str, start: float, end: float, arguments: dict[str, int]
) -> Event:
    return {
        "ph": "X",
        "pid": _PIPELINE,
        "tid": worker,
        "name": name,
        "cat": category,
        "ts": _microseconds(timeline, start),
        "dur": (end - start) * 1e6,
        "args": arguments,
    }


def _messages(timeline: Timeline) -> Iterator[Event]:
    """Begin and end of every message: one may leave before the one ahead has arrived, which "X" events cannot show."""
    for number, (source, target, direction, micro_batch, start, end) in enumerate(timeline.transfers):
        common = {
            "pid": _LINKS,
            "tid": 0,
            "id": number,
            "cat": f"{direction} {source} to {target}",
            "name": f"{direction} {source} to {target}: {micro_batch}",
        }
        yield {"ph": "b", "ts": _microseconds(timeline, start), **common}
        yield {"ph": "e", "ts": _microseconds(timeline, end), **common}


def _microseconds(timeline: Timeline, time: float) -> float:
    return (time - timeline.start) * 1e6


_WORDS = {kind: kind.name.lower().replace("_", " ") for kind in KINDS}
