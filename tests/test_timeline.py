"""Timelines: shares, pictures, traces, whether predicted or recorded."""

import json
import sys

import numpy as np
import pytest

from gpipe import Action, Kind, Span, Timeline
from gpipe.schedules import gpipe, interleaved_one_f_one_b, with_recompute, zero_bubble_h1
from gpipe.simulate import StageCost, simulate
from gpipe.timeline import Flush, Memory, Transfer

F, R, B, I, W = Kind  # noqa: E741


def spans(*rows):
    """Spans from rows such as (0, F, 1, start, end)."""
    return tuple(Span(Action(*row[:3]), *row[3:]) for row in rows)


def recorded():
    """Two workers; between the halves the caller computes its loss for 6 s."""
    return Timeline(
        (
            spans((0, F, 0, 100.0, 101.0), (0, R, 0, 108.0, 109.0), (0, B, 0, 110.0, 112.0)),
            spans((1, F, 0, 101.0, 102.0), (1, B, 0, 108.0, 110.0)),
        )
    )


def test_nothing():
    nothing = Timeline(())
    assert (nothing.workers, nothing.makespan, nothing.busy, nothing.idle, nothing.bubble) == ((), 0, (), (), 0)
    assert (nothing.render(), nothing.peak_bytes, nothing.worker_memory, nothing.communication) == ("", (), (), ())
    idle = Timeline(((), ()))
    assert (idle.makespan, idle.busy, idle.render()) == (0, (0, 0), "")


def test_shares_leave_the_callers_own_time_out():
    timeline = recorded()
    assert timeline.makespan == 2 + 4
    assert timeline.busy == (4 / 6, 3 / 6)
    assert timeline.idle == (1 - 4 / 6, 1 - 3 / 6)
    assert timeline.bubble == pytest.approx(5 / 12)
    assert timeline.recompute == (1 / 6, 0)
    assert timeline.communication == (0, 0)
    assert (timeline.start, timeline.end) == (100, 112)


def test_halves_that_overlap_are_one():
    timeline = Timeline(
        (spans((0, F, 0, 0, 1), (0, F, 1, 1, 2)), spans((1, F, 0, 1, 2), (1, B, 0, 2, 3), (1, F, 1, 7, 8)))
    )
    assert timeline.makespan == 8


def test_communication_is_what_is_not_hidden():
    timeline = Timeline(
        (spans((0, F, 0, 0.0, 2.0), (0, B, 0, 8.0, 10.0)), spans((1, F, 0, 4.0, 6.0), (1, B, 0, 6.0, 7.0))),
        transfers=[
            Transfer(0, 1, "forward", 0, 2.0, 3.5),
            Transfer(0, 1, "forward", 1, 3.0, 5.0),  # one second of which worker 1 computes
            Transfer(1, 0, "backward", 0, 7.0, 8.0),
        ],
        flush=(Flush(1, "all_reduce", 7.0, 9.0), Flush(1, "optimizer", 9.0, 10.0)),
    )
    assert timeline.makespan == 10
    assert timeline.communication == (0.1, 0.2 + 0.2)  # of worker 1, two seconds until 4, and two of the all-reduce
    assert timeline.busy == (0.4, 0.4)


def test_sequences_are_held_alike():
    given = recorded()
    assert given == recorded()
    assert given != Timeline(given.workers[:1])
    assert list(given.workers[1]) == list(spans((1, F, 0, 101.0, 102.0), (1, B, 0, 108.0, 110.0)))
    assert isinstance(given.workers[0][0].action.kind, Kind)
    assert type(given.workers[0][0].start) is float
    sent = [Transfer(0, 1, "forward", 0, 2.0, 3.5), Transfer(1, 0, "backward", 0, 7.0, 8.0)]
    assert list(Timeline((), transfers=sent).transfers) == sent


def test_memory():
    memory = Memory([0.0, 1.0, 3.0], [5, 9, 2])
    assert memory.peak == 9
    assert memory[1] == (1.0, 9)
    other = Memory([0.5, 1.0, 2.0], [1, 1, 4])
    assert list(Memory.total([memory, other])) == [(0, 5), (0.5, 6), (1, 10), (2, 13), (3, 6)]
    timeline = simulate(interleaved_one_f_one_b(2, 1), StageCost(1, 1, 1, activation_bytes=1))
    assert (timeline.peak_bytes, [m.peak for m in timeline.worker_memory]) == ((1, 1), [2])


def test_render():
    assert recorded().render(24) == (
        "worker 0 |F0              R0  B0--|  67% busy\n"  # to scale: a column is half a second
        "worker 1 |  F0            B0--    |  50% busy"
    )
    split = simulate(zero_bubble_h1(2, 2), StageCost(1, 1, 1), optimizer_seconds=2)
    assert split.render(27) == (
        "worker 0 |F0-F1-   I0-W0-I1-W1-optimi|  89% busy\nworker 1 |   F0-I0-F1-I1-W0-W1-optimi|  89% busy"
    )


def test_render_names_stages_where_a_worker_hosts_several():
    text = simulate(interleaved_one_f_one_b(2, 1), StageCost(2, 1, 1)).render(24)
    assert text == "worker 0 |0F0---1F0---1B0---0B0---| 100% busy"


def predicted():
    cost = StageCost(1.0, 1.0, 0.5, activation_bytes=10, boundary_bytes=2, parameter_bytes=3)
    return simulate(with_recompute(gpipe(2, 3), 1), cost, (0.25, 4.0), optimizer_seconds=0.5)


@pytest.mark.parametrize("timeline", [predicted(), recorded()], ids=["predicted", "recorded"])
def test_chrome_trace(timeline, tmp_path):
    """By the schema of the Trace Event Format: what each phase must carry, and of what type."""
    timeline.to_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert set(trace) == {"displayTimeUnit", "traceEvents"}
    required = {
        "M": {"name": str, "pid": int, "tid": int, "args": dict},
        "X": {"name": str, "cat": str, "pid": int, "tid": int, "ts": float, "dur": float, "args": dict},
        "C": {"name": str, "pid": int, "ts": float, "args": dict},
        "b": {"name": str, "cat": str, "id": int, "pid": int, "tid": int, "ts": float},
        "e": {"name": str, "cat": str, "id": int, "pid": int, "tid": int, "ts": float},
    }
    events = trace["traceEvents"]
    for event in events:
        fields = required[event["ph"]]
        assert {name: type(value) for name, value in event.items() if name != "ph"} == fields
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
    work = {(e["tid"], e["name"]): (e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    for worker, row in enumerate(timeline.workers):
        for action, start, end in row:
            ts, duration = work.pop((worker, str(action)))
            assert (ts, duration) == pytest.approx(((start - timeline.start) * 1e6, (end - start) * 1e6))
    assert [name for _, name in work] == [part.name for part in timeline.flush]
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named == {0: "worker 0 (stage 0)", 1: "worker 1 (stage 1)"}
    levels = [(e["name"], e["args"]["bytes"]) for e in events if e["ph"] == "C"]
    assert levels == [(f"stage {k} bytes", level.bytes) for k, memory in enumerate(timeline.memory) for level in memory]
    begun = {e["id"]: e["ts"] for e in events if e["ph"] == "b"}
    ended = {e["id"]: e["ts"] for e in events if e["ph"] == "e"}
    assert len(begun) == len(ended) == len(timeline.transfers)
    assert all(begun[i] <= ended[i] for i in begun)


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    figure = predicted().figure(recorded(), title="one step")
    above, below = figure.axes
    assert figure.get_suptitle() == "one step"
    assert above.get_title(loc="left").startswith("predicted: ")
    assert below.get_title(loc="left") == "measured: 6 s, bubble 41.7%"
    assert above.get_xlim() == below.get_xlim() == (0, predicted().end)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Forward", "Recompute", "Backward", "flush"]
    assert [t.get_text() for t in above.get_yticklabels()] == ["worker 0", "worker 1"]
    starts = sorted(path.vertices[:, 0].min() for bars in below.collections for path in bars.get_paths())
    assert starts == pytest.approx([0, 1, 8, 8, 10])
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_figure_of_nothing():
    pytest.importorskip("matplotlib")
    assert len(Timeline(()).figure().axes) == 1


def test_figure_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install matplotlib, or 'gpipe\[train\]'"):
        recorded().figure()


def test_many_spans_are_arrays():
    timeline = simulate(gpipe(4, 1000), StageCost(1, 1, 1))
    assert len(timeline.workers[0]) == 2000
    assert timeline.workers[0].start.dtype == np.float64
    assert timeline.render(50).count("\n") == 3
