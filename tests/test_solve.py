import itertools
import json
import math
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pytest

from gpipe import schedules
from gpipe.partitioning.cost import CellCost, SkipCost
from gpipe.partitioning.makespan import Divided, gpipe_seconds, one_f_one_b_seconds
from gpipe.partitioning.solve import Infeasible, predict, solve

# --- an event-driven simulation, written without regard to the solver's formulas -------------------------------------


def actions(schedule, stages, k, micro_batches, keep):
    """What stage k does, in order, as (kind, micro-batch)."""
    m = range(micro_batches)
    if schedule == "gpipe":
        order = [("F", i) for i in m] + [("B", i) for i in reversed(m)]
        kept = set(m[micro_batches - keep :])
    else:
        ahead = min(stages - k, micro_batches)
        order = [("F", i) for i in m[:ahead]]
        for i in m:
            order += [("B", i), *([("F", i + ahead)] if i + ahead < micro_batches else [])]
        kept = set(m[:keep])
    return [step for kind, i in order for step in ([("R", i)] if kind == "B" and i not in kept else []) + [(kind, i)]]


class Wire:
    """Carries one message after the other."""

    def __init__(self, transit, occupied):
        self.transit, self.occupied, self.free, self.arrival = transit, occupied, -math.inf, {}

    def send(self, m, now):
        start = max(now, self.free)
        self.free = start + self.occupied
        self.arrival[m] = start + self.transit


def simulated(schedule, stages, micro_batches):
    """Seconds, and when each stage performs each action; ``stages``: (forward, backward, keep, transit, occupied)."""
    count = len(stages)
    todo = [actions(schedule, count, k, micro_batches, s[2]) for k, s in enumerate(stages)]
    forward, backward = ([Wire(s[3], s[4]) for s in [*stages, (0,) * 5]] for _ in range(2))
    forward[0].arrival = backward[count].arrival = dict.fromkeys(range(micro_batches), 0.0)
    clock, spans = [0.0] * count, [{} for _ in stages]
    while any(todo):
        for k, (f, b, *_) in enumerate(stages):
            while todo[k]:
                kind, m = todo[k][0]
                source = {"F": forward[k].arrival, "R": {m: 0.0}, "B": backward[k + 1].arrival}[kind]
                if m not in source:
                    break
                todo[k].pop(0)
                start = max(clock[k], source[m])
                clock[k] = start + (b if kind == "B" else f)
                spans[k][kind, m] = (start, clock[k])
                if kind == "F":
                    forward[k + 1].send(m, clock[k])
                if kind == "B":
                    backward[k].send(m, clock[k])
    return max(clock), spans


def random_stages(rng, count, micro_batches, linked):
    stages = []
    for k in range(count):
        occupied = rng.lognormal(-0.5) * linked * (k > 0)
        transit = occupied + rng.lognormal() * linked * (k > 0)
        stages.append((rng.lognormal(), rng.lognormal(), int(rng.integers(0, micro_batches + 1)), transit, occupied))
    return stages


@pytest.mark.parametrize("linked", [0, 1])
@pytest.mark.parametrize(("schedule", "seconds"), [("gpipe", gpipe_seconds), ("1f1b", one_f_one_b_seconds)])
def test_the_step_is_what_a_simulation_of_the_schedule_takes(schedule, seconds, linked):
    rng = np.random.default_rng(1)
    for _ in range(150):
        count, micro_batches = int(rng.integers(1, 7)), int(rng.integers(1, 16))
        divisions = [random_stages(rng, count, micro_batches, linked) for _ in range(3)]
        columns = Divided(*(np.array(column) for column in np.array(divisions).transpose(2, 0, 1)))
        expected = [simulated(schedule, stages, micro_batches)[0] for stages in divisions]
        assert seconds(columns, micro_batches) == pytest.approx(expected)


def test_the_simulation_performs_the_runtimes_own_schedule():
    keep = (0, 1, 3, 5)
    runtime = schedules.with_recompute(schedules.gpipe(4, 5), keep).workers
    for k, worker in enumerate(runtime):
        assert [(str(a.kind), a.micro_batch) for a in worker] == actions("gpipe", 4, k, 5, keep[k])


# --- random chains, and every division of them -----------------------------------------------------------------------


def chain(rng, count, spread=0.7, ratio=(1.6, 2.4)):
    forward = rng.lognormal(0, spread, count) * 1e-3
    backward = forward * rng.uniform(*ratio, count)
    sizes = (rng.lognormal(0, 1, (count, 4)) * [1e7, 1e6, 1e6, 1e6]).astype(int)
    kept = [None if rng.random() < 0.3 else int(rng.random() * 2e6) for _ in range(count)]
    handed_on = [int(rng.random() * size) for size in sizes[:, 0]]
    return [
        CellCost(f"cell{i}", forward[i], backward[i], *(int(x) for x in sizes[i]), kept[i], handed_on[i])
        for i in range(count)
    ]


def skipping(rng, cells, share=0.4):
    """The same cells, of which some stash values for later ones."""
    count = len(cells)

    def skip(i):
        value, storage = (int(size) for size in rng.lognormal(0, 1, 2) * 1e6)
        kept = None if rng.random() < 0.3 else int(rng.random() * value)
        handed_on = int(rng.random() * (kept or 0))
        gradient = None if rng.random() < 0.3 else int(rng.random() * storage)
        return SkipCost(int(rng.integers(1, count - i)), value, kept, handed_on, gradient, storage)

    return [
        replace(c, skips=tuple(skip(i) for _ in range(rng.binomial(2, share)) if i + 1 < count))
        for i, c in enumerate(cells)
    ]


def ways(cells):
    """Every value that skips cells, with the cell that stashes and the one that pops it."""
    return [(skip, i, i + skip.cells_on) for i, cell in enumerate(cells) for skip in cell.skips]


def some_limit(cells, stages, micro_batches, share):
    """Bytes between what an even division needs with one micro-batch kept, and with all."""
    static = 4 * sum(c.parameter_bytes for c in cells) / stages
    inputs = micro_batches * np.mean([c.boundary_bytes for c in cells])
    one = sum(c.activation_bytes for c in cells) / stages
    return int(1.1 * (static + inputs + one) + share * (micro_batches - 1) * one)


def stage_bytes(cells, first, end, k, setting, keep):
    """Peak bytes of one stage, term by term."""
    stages, micro_batches, schedule, input_bytes = (
        setting[key] for key in ("stages", "micro_batches", "schedule", "input_bytes")
    )
    part = cells[first:end]
    entering = cells[first - 1].boundary_bytes if first else input_bytes
    brought = [skip for skip, source, target in ways(cells) if source < first <= target < end]
    inside = sum(skip.handed_on_bytes for skip, source, target in ways(cells) if first <= source and target < end)
    passing = [
        sum(s.passing for s, a, b in ways(cells) if a < i < b and (first <= a or b < end)) for i in range(first, end)
    ]
    flight = micro_batches if schedule == "gpipe" else min(stages - k, micro_batches)
    inputs = micro_batches if schedule == "gpipe" or k == 0 else min(flight + 1, micro_batches)
    static = 4 * sum(c.parameter_bytes for c in part)
    running = [
        sum(c.activation_bytes for c in part[: i + 1]) + c.workspace_bytes + passing[i] + inside
        for i, c in enumerate(part)
    ]
    one = sum(c.activation_bytes for c in part) - part[-1].handed_on_bytes + inside
    at_once = keep + 1 if schedule == "1f1b" and keep else keep  # kept ones, and those of a forward that drops its own
    more = max(0, min(at_once, flight) - 1)
    kept_input = entering if part[0].kept_input_bytes is None else min(entering, part[0].kept_input_bytes)
    outputs = 2 * micro_batches * cells[-1].boundary_bytes if schedule == "gpipe" and end == len(cells) else 0
    skipped, let_go = sum(s.value_bytes for s in brought), sum(s.value_bytes - s.kept for s in brought)
    skips = micro_batches if schedule == "gpipe" else min(stages, micro_batches)  # they may come from the first stage
    further = max(0, one + kept_input - entering - let_go)
    size = static + inputs * entering + skips * skipped + outputs + max(one, *running) + more * further
    if schedule == "gpipe":  # gradients come with the first backward, and find its activations and input gone
        gradients = [sum(c.parameter_bytes for c in part[i:]) for i in range(len(part))]
        later = max(running) + gradients[0] - max(map(sum, zip(running, gradients, strict=True)))
        size -= later if micro_batches == 1 else min(later, entering + skipped + (further if more else 0))
    return size


def kept(cells, first, end, k, setting):
    """Micro-batches a stage keeps, None if it does not fit."""
    limit, micro_batches = setting["limits"][k], setting["micro_batches"]
    tries = (
        [setting["keep"][k]]
        if setting["keep"]
        else [micro_batches, *range(micro_batches - 1, 0 if setting["schedule"] == "gpipe" else -1, -1)]
    )
    return next((q for q in tries if stage_bytes(cells, first, end, k, setting, q) <= limit), None)


def all_divisions(cells, setting):
    """Every division that fits, as cuts, and its stages' (forward, backward, keep, transit, occupied)."""
    stages, count = setting["stages"], len(cells)
    known = {}
    for cuts in itertools.combinations(range(1, count), stages - 1):
        cuts = (0, *cuts, count)
        rows = []
        for k, (first, end) in enumerate(itertools.pairwise(cuts)):
            if (k, first, end) not in known:
                speed, part = setting["speeds"][k], cells[first:end]
                latency, bandwidth = setting["links"][k - 1] if k and setting["links"] else (0.0, math.inf)
                crossing = sum(skip.value_bytes for skip, source, target in ways(cells) if source < first <= target)
                occupied = (cells[first - 1].boundary_bytes + crossing) / bandwidth
                forward, backward = (
                    sum(getattr(c, f"{way}_seconds") for c in part) / speed for way in ("forward", "backward")
                )
                keep = kept(cells, first, end, k, setting)
                known[k, first, end] = (forward, backward, keep, latency + occupied, occupied)
            rows.append(known[k, first, end])
        if all(row[2] is not None for row in rows):
            yield cuts, rows


def fewest_seconds(cells, setting):
    """Of every division that fits; infinite if none does."""
    rows = [rows for _, rows in all_divisions(cells, setting)]
    if not rows:
        return math.inf
    columns = Divided(*np.array(rows).transpose(2, 0, 1))
    seconds = gpipe_seconds if setting["schedule"] == "gpipe" else one_f_one_b_seconds
    columns = columns._replace(keep=columns.keep.astype(int))
    return float(seconds(columns, setting["micro_batches"]).min())


def random_case(rng, schedule, kind):
    """A chain, the setting it is divided in, and the same as arguments of ``solve``."""
    count = int(rng.integers(4, 14))
    stages = int(rng.integers(2, min(5, count) + 1))
    micro_batches = int(rng.choice([1, 2, 3, 4, 8, 16, 40]))
    cells = chain(rng, count, rng.choice([0.1, 0.7, 1.2]), (1.6, 2.4) if rng.random() < 0.5 else (0.3, 4.0))
    limit, links, speeds, keep = None, None, None, None
    if kind == "skips":
        cells = skipping(rng, cells)
        kind = ["limit", "keep", "links", "all"][int(rng.integers(4))]
    if kind in ("limit", "all"):
        limit = some_limit(cells, stages, micro_batches, rng.uniform(-0.05, 0.8))
    if kind == "all":
        limit = [int(limit * x) for x in rng.uniform(0.8, 1.4, stages)]
    if kind == "keep":
        keep = [int(x) for x in rng.integers(0, micro_batches + 1, stages)]
    if kind in ("links", "all"):
        links = [(float(rng.lognormal(-8, 1)), float(10 ** rng.uniform(8, 11))) for _ in range(stages - 1)]
        speeds = [float(x) for x in rng.uniform(0.5, 2, stages)]
    given = {"stages": stages, "micro_batches": micro_batches, "schedule": schedule, "input_bytes": 10**6}
    setting = {
        **given,
        "limits": limit if isinstance(limit, list) else [limit or math.inf] * stages,
        "keep": keep,
        "links": links,
        "speeds": speeds or [1.0] * stages,
    }
    return cells, setting, {**given, "memory_limit": limit, "keep": keep, "links": links, "device_speeds": speeds}


@pytest.mark.parametrize("kind", ["free", "limit", "keep", "links", "all", "skips"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_as_good_as_the_best_of_all_divisions(schedule, kind):
    rng = np.random.default_rng(7)
    solved = refused = 0
    for case in range(60 if schedule == "1f1b" else 120):
        cells, setting, arguments = random_case(rng, schedule, kind)
        best = fewest_seconds(cells, setting)
        if best == math.inf:
            refused += 1
            with pytest.raises(Infeasible, match="no division"):
                solve(cells, **arguments)
            continue
        solved += 1
        found = solve(cells, **arguments)
        assert best * (1 - 1e-9) <= found.seconds <= best * 1.001, case
        assert found.lower_bound <= best * (1 + 1e-9), case
        assert_consistent(found, cells, setting)
    assert solved > 30
    assert refused > 5 or kind not in ("limit", "all")


def assert_consistent(found, cells, setting):
    """Balance, keep, bytes and seconds belong together, as restated above."""
    assert sum(found.balance) == len(cells)
    assert min(found.balance) >= 1
    cuts = (0, *itertools.accumulate(found.balance))
    (rows,) = [rows for other, rows in all_divisions(cells, setting) if other == cuts]
    assert found.keep == tuple(row[2] for row in rows)
    spans = enumerate(itertools.pairwise(cuts))
    assert found.bytes == tuple(stage_bytes(cells, *span, k, setting, found.keep[k]) for k, span in spans)
    seconds, performed = simulated(setting["schedule"], rows, setting["micro_batches"])
    assert found.seconds == pytest.approx(seconds)
    busy = [sum(end - start for start, end in spans.values()) for spans in performed]
    assert found.busy_seconds == pytest.approx(busy)
    assert found.bubble == pytest.approx(1 - np.mean(busy) / seconds, abs=1e-9)


# --- memory ----------------------------------------------------------------------------------------------------------


def peaks(schedule, stages, sizes, micro_batches):
    """The most bytes of inputs and activations each stage holds; ``sizes``: (input, activations of a micro-batch)."""
    _, spans = simulated(schedule, stages, micro_batches)
    found = []
    for k, (entering, activations) in enumerate(sizes):
        events = []
        for m in range(micro_batches):
            made = 0.0 if k == 0 else spans[k - 1]["F", m][1] + stages[k][3]
            graph = spans[k].get(("R", m), spans[k]["F", m])[0]
            end = spans[k]["B", m][1]
            events += [(made, entering), (graph, activations), (end, -entering - activations)]
            if ("R", m) in spans[k]:  # forward has the activations too, while it runs
                start, stop = spans[k]["F", m]
                events += [(start, activations), (stop, -activations)]
        held, most = 0, 0
        for _, change in sorted(events, key=lambda event: (event[0], event[1])):
            held += change
            most = max(most, held)
        found.append(most)
    return found


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_bytes_are_the_peak_of_a_simulation(schedule):
    rng = np.random.default_rng(3)
    reached = 0
    for _ in range(60):
        count, micro_batches = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        bare = {"workspace_bytes": 0, "parameter_bytes": 0, "kept_input_bytes": None, "handed_on_bytes": 0}
        cells = [replace(c, **bare) for c in chain(rng, count)]
        cells[-1] = replace(cells[-1], boundary_bytes=0)
        keep = [int(x) for x in rng.integers(0, micro_batches + 1, count)]
        found = solve(
            cells, count, micro_batches=micro_batches, schedule=schedule, keep=keep, input_bytes=cells[0].boundary_bytes
        )
        stages = [(c.forward_seconds, c.backward_seconds, q, 0, 0) for c, q in zip(cells, keep, strict=True)]
        entering = [cells[0].boundary_bytes, *(c.boundary_bytes for c in cells[:-1])]
        sizes = [(e, c.activation_bytes) for e, c in zip(entering, cells, strict=True)]
        peak = peaks(schedule, stages, sizes, micro_batches)
        if schedule == "gpipe":
            assert list(found.bytes) == peak
        assert all(most <= claimed for most, claimed in zip(peak, found.bytes, strict=True))
        reached += sum(most == claimed for most, claimed in zip(peak, found.bytes, strict=True))
    assert reached > 60


def test_bytes_by_hand():
    cells = [
        CellCost("a", 1.0, 2.0, activation_bytes=10, boundary_bytes=3, parameter_bytes=7, workspace_bytes=5),
        CellCost("b", 1.0, 2.0, activation_bytes=20, boundary_bytes=4, parameter_bytes=9, workspace_bytes=2),
        CellCost("c", 1.0, 2.0, activation_bytes=40, boundary_bytes=1, parameter_bytes=0, workspace_bytes=1),
    ]
    one = solve(cells, 1, micro_batches=4, keep=2, static_bytes_per_param=2.5, input_bytes=6)
    assert one.bytes == (1.5 * 16 + 4 * 6 + 8 * 1 + 2 * 70 + 1,)  # no gradients yet when a's and b's are made
    split = solve(cells, 3, micro_batches=4, memory_limit=[57 + 19, 50 + 51, 1000], input_bytes=6)
    assert split.keep == (1, 2, 4)  # 28 + 24 + 5 leave 19 for a, 36 + 12 + 2 leave 51 for b
    interleaved = solve(cells, 3, micro_batches=4, schedule="1f1b", input_bytes=6)
    assert interleaved.bytes == (28 + 4 * 6 + 3 * 10 + 5, 36 + 3 * 3 + 2 * 20 + 2, 2 * 4 + 40 + 1)


def test_bytes_of_skips_by_hand():
    skip = SkipCost(2, 100, kept_bytes=30, handed_on_bytes=20, gradient_bytes=110, gradient_storage_bytes=150)
    cells = [CellCost(f"c{i}", 1.0, 2.0, 10, 3, 0) for i in range(4)]
    cells[0] = replace(cells[0], skips=(skip,))
    cells[3] = replace(cells[3], boundary_bytes=0)

    def held(balance, keep=4, **arguments):
        return predict(cells, balance, micro_batches=4, keep=keep, input_bytes=6, **arguments).bytes

    # one stage: what only the third cell keeps is an activation; while the second runs, the gradient waits
    assert held([4]) == (4 * 6 + 4 * 60 + (20 + 150 - 40),)
    # two: all inputs wait; of a kept one 70 bytes go, more than its activations take
    assert held([1, 3]) == (4 * 6 + 4 * 10, 4 * 103 + 10 + 150)
    assert held([2, 2]) == (4 * 6 + 4 * 20 + 150, 4 * 103 + 20)
    # it passes over the second stage, which has nothing of it
    assert held([1, 1, 2])[1] == 4 * 3 + 4 * 10
    # under 1F1B it may come from as far back as the first stage
    assert held([1, 1, 2], schedule="1f1b")[2] == 2 * 3 + 3 * 100 + 20


def test_links_carry_what_skips_stages_with_the_boundaries():
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, 10, 1) for i in range(4)]
    cells[0] = replace(cells[0], skips=(SkipCost(2, 50),))
    found = predict(cells, [1, 1, 1, 1], micro_batches=4, links=(0.5, 10))
    assert [stage.arrival_seconds for stage in found.stages] == [0, 6.5, 6.5, 1.5]
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, 1, 1) for i in range(4)]
    assert solve(cells, 2, micro_batches=8, links=(0.0, 1.0)).balance == (2, 2)
    cells[1] = replace(cells[1], skips=(SkipCost(1, 50),))
    assert solve(cells, 2, micro_batches=8, links=(0.0, 1.0)).balance in ((1, 3), (3, 1))


def test_a_wider_stage_may_fit_where_a_narrower_does_not():
    small, huge = 1, 1000
    sizes = [small, huge, huge, small, huge, small]
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, size, 0) for i, size in enumerate(sizes)]
    found = solve(cells, 3, micro_batches=4, memory_limit=4 + 4 * 4, input_bytes=0)
    assert found.balance == (1, 3, 2)
    with pytest.raises(Infeasible, match="stage"):
        solve(cells, 4, micro_batches=4, memory_limit=4 + 4 * 4, input_bytes=0)


# --- known results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "slowdown"), [(0, 73 / 57), (1, 72 / 57), (4, 69 / 57), (8, 65 / 57), (16, 1)])
def test_recompute_hidden_and_paid(keep, slowdown):
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, 1, 1) for i in range(4)]
    found = solve(cells, 4, micro_batches=16, keep=keep)
    assert found.seconds == pytest.approx(57 * slowdown)
    assert found.recompute == pytest.approx((16 - keep) / found.seconds)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_even_cells_are_divided_evenly(schedule):
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, 1, 1) for i in range(12)]
    found = solve(cells, 4, micro_batches=8, schedule=schedule)
    assert found.balance == (3, 3, 3, 3)
    assert found.seconds == pytest.approx((8 + 3) * 9)
    assert found.bubble == pytest.approx(3 / 11)


def test_the_free_step_is_the_published_formula():
    rng = np.random.default_rng(0)
    for _ in range(20):
        found = solve(chain(rng, 30), 6, micro_batches=10)
        forward = [s.forward_seconds for s in found.stages]
        backward = [s.backward_seconds for s in found.stages]
        assert found.seconds == pytest.approx(sum(forward) + sum(backward) + 9 * (max(forward) + max(backward)))


def test_the_slowest_forward_and_the_slowest_backward_may_be_different_stages():
    times = [(3, 5), (4, 3), (4, 2), (2, 6), (2, 4)]
    cells = [CellCost(f"c{i}", float(f), float(b), 1, 1, 1) for i, (f, b) in enumerate(times)]
    # max F + max B is 7 + 8; [1, 2, 2] has the smallest max (F + B), 14 against 15, but 8 + 10
    assert solve(cells, 3, micro_batches=100).balance == (2, 2, 1)


def test_a_slow_link_moves_the_cut_to_a_small_boundary():
    sizes = [10, 10, 10, 1, 10, 10]
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, size, 1) for i, size in enumerate(sizes)]
    assert solve(cells, 2, micro_batches=8).balance == (3, 3)
    assert solve(cells, 2, micro_batches=8, links=(0.0, 1.0)).balance == (4, 2)
    free, late = (solve(cells, 2, micro_batches=8, links=(latency, math.inf)) for latency in (0.0, 5.0))
    assert late.seconds == pytest.approx(free.seconds + 2 * 5.0)


def test_a_fast_device_gets_more_cells():
    cells = [CellCost(f"c{i}", 1.0, 2.0, 1, 1, 1) for i in range(8)]
    found = solve(cells, 2, micro_batches=64, device_speeds=[3, 1])
    assert found.balance == (6, 2)
    assert [s.forward_seconds for s in found.stages] == [2.0, 2.0]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("seconds", [0.0, 1e-300, 1e300])
def test_extreme_seconds(schedule, seconds):
    cells = [CellCost(f"c{i}", seconds * (i % 2), 0.0, i, i, i) for i in range(9)]
    found = solve(cells, 3, micro_batches=5, schedule=schedule, memory_limit=10**6)
    assert sum(found.balance) == 9
    assert found.seconds >= seconds * 4
    assert str(found)


def test_one_stage_holds_everything():
    cells = chain(np.random.default_rng(0), 5)
    found = solve(cells, 1, micro_batches=7, keep=2)
    assert found.balance == (5,)
    busy = sum(7 * (c.forward_seconds + c.backward_seconds) + 5 * c.forward_seconds for c in cells)
    assert found.seconds == pytest.approx(busy)
    assert found.bubble == pytest.approx(0, abs=1e-9)


# --- long chains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "schedule", "gap"), [(None, "gpipe", 0.001), (None, "1f1b", 0.001), (0.3, "gpipe", 0.01)]
)
def test_long_chains_come_with_a_proof(share, schedule, gap):
    cells = chain(np.random.default_rng(5), 500)
    limit = None if share is None else some_limit(cells, 16, 64, share)
    found = solve(cells, 16, micro_batches=64, schedule=schedule, memory_limit=limit)
    assert found.lower_bound * (1 - 1e-9) <= found.seconds <= found.lower_bound * (1 + gap)
    assert limit is None or len(set(found.keep)) > 2
    assert limit is None or max(found.bytes) <= limit


def test_long_chains_with_skips_come_with_a_proof():
    cells = chain(np.random.default_rng(5), 500)
    cells = [replace(c, skips=(SkipCost(499 - 2 * i, 10**6),)) if i < 249 else c for i, c in enumerate(cells)]
    limit = some_limit(cells, 16, 64, 0.3) + 64 * 3 * 10**7
    found = solve(cells, 16, micro_batches=64, memory_limit=limit, links=(1e-6, 1e11))
    assert found.lower_bound * (1 - 1e-9) <= found.seconds <= found.lower_bound * 1.01
    assert max(found.bytes) <= limit


def test_memory_does_not_grow_with_the_square_of_the_cells():
    cells = chain(np.random.default_rng(5), 2500)
    tracemalloc.start()
    found = solve(cells, 50, micro_batches=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.seconds <= found.lower_bound * 1.001
    assert peak < 8 * len(cells) ** 2 / 2  # half of one number for every two cells


# --- no division fits ------------------------------------------------------------------------------------------------


def shrunk(cells, by):
    """Cells of a smaller micro-batch."""

    def less(size):
        return math.ceil(size * by)

    return [
        replace(
            c,
            activation_bytes=less(c.activation_bytes),
            boundary_bytes=less(c.boundary_bytes),
            workspace_bytes=less(c.workspace_bytes),
            kept_input_bytes=None if c.kept_input_bytes is None else less(c.kept_input_bytes),
            handed_on_bytes=less(c.handed_on_bytes),
            skips=tuple(
                SkipCost(s.cells_on, *map(less, (s.value_bytes, s.kept, s.handed_on_bytes, s.gradient, s.passing)))
                for s in c.skips
            ),
        )
        for c in cells
    ]


def fits(cells, stages, micro_batches, **arguments):
    try:
        solve(cells, stages, micro_batches=micro_batches, **arguments)
    except Infeasible:
        return False
    return True


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_what_would_do_does_and_less_does_not(schedule, skips):
    rng = np.random.default_rng(2)
    advised = 0
    for _ in range(12):
        count, micro_batches = int(rng.integers(5, 11)), int(rng.choice([2, 4, 6]))
        stages = int(rng.integers(2, 5))
        cells = skipping(rng, chain(rng, count)) if skips else chain(rng, count)
        limit = int(some_limit(cells, stages, micro_batches, 0) * rng.uniform(0.4, 0.9))
        limit += micro_batches * cells[-1].boundary_bytes if schedule == "gpipe" else 0
        settled = {"schedule": schedule, "input_bytes": 0}
        with pytest.raises(Infeasible, match=r"needs .* too much\. Would do: memory_limit=") as caught:
            solve(cells, stages, micro_batches=micro_batches, memory_limit=limit, **settled)
        error = caught.value
        assert error.memory_limit == (limit + error.missing_bytes,) * stages
        assert fits(cells, stages, micro_batches, memory_limit=error.memory_limit[0], **settled)
        assert not fits(cells, stages, micro_batches, memory_limit=error.memory_limit[0] - 1, **settled)
        enough = [k for k in range(1, count + 1) if fits(cells, k, micro_batches, memory_limit=limit, **settled)]
        assert error.stages == (enough[0] if enough else None)
        if error.micro_batches is not None:
            for chunks, expected in ((error.micro_batches, True), (error.micro_batches - 1, False)):
                smaller = shrunk(cells, micro_batches / chunks)
                assert fits(smaller, stages, chunks, memory_limit=limit, **settled) == expected
        advised += (error.stages is not None) + (error.micro_batches is not None)
    assert advised > 8


def test_the_error_says_where_what_and_what_would_do():
    cells = [CellCost(f"c{i}", 1.0, 2.0, activation_bytes=100, boundary_bytes=10, parameter_bytes=5) for i in range(8)]
    cells[7] = replace(cells[7], boundary_bytes=0)  # no outputs
    with pytest.raises(Infeasible) as caught:
        solve(cells, 2, micro_batches=4, memory_limit=500, static_bytes_per_param=4.0)
    message = str(caught.value)
    # the second stage: 80 of parameters less an input for which the gradients wait, 40 of inputs, 400 of activations
    assert caught.value.stage == 1
    assert caught.value.cells == ("c4", "c7")
    assert caught.value.missing_bytes == 10
    assert "stage 1 (cells 'c4' to 'c7') needs 510 bytes of 500 bytes" in message
    assert "parameters and optimizer 70 bytes, inputs of 4 micro-batches 40 bytes, outputs 0 bytes" in message
    assert "outputs 0 bytes, activations 400 bytes, workspace 0 bytes" in message
    assert "memory_limit=510 (510 bytes); or 3 stages; or 5 micro-batches of the same mini-batch" in message


def test_a_cell_that_fits_nowhere_is_named():
    cells = chain(np.random.default_rng(0), 6)
    cells[3] = replace(cells[3], name="giant", parameter_bytes=10**10)
    with pytest.raises(Infeasible, match=r"cell 'giant' alone needs 37\.\d+ GiB, so split it\. No number of micro-b"):
        solve(cells, 3, micro_batches=4, memory_limit=10**9)


def test_keeping_less_is_advised_where_it_would_do():
    cells = [CellCost(f"c{i}", 1.0, 2.0, 100, 1, 1) for i in range(4)]
    with pytest.raises(Infeasible, match=r"or keep=1\.") as caught:
        solve(cells, 2, micro_batches=8, keep=4, memory_limit=500)
    assert caught.value.keep == 1


def test_devices_of_different_memory():
    cells = [CellCost(f"c{i}", 1.0, 2.0, 100, int(i < 5), 0) for i in range(6)]
    assert solve(cells, 2, micro_batches=1, memory_limit=[None, 150]).balance == (5, 1)
    with pytest.raises(Infeasible) as caught:
        solve(cells, 2, micro_batches=1, memory_limit=[350, 150])
    assert caught.value.memory_limit == (350 + 100 - 50 + 1, 150 + 100 - 50 + 1)
    assert fits(cells, 2, 1, memory_limit=caught.value.memory_limit)
    with pytest.raises(Infeasible) as caught:
        solve(cells, 2, micro_batches=1, memory_limit=[None, 50])
    assert caught.value.memory_limit == (None, 101)


# --- what a person reads ---------------------------------------------------------------------------------------------


def test_the_partition_explains_itself():
    cells = [CellCost(f"c{i}", 0.001, 0.002, 2**20, 2**10, 2**20) for i in range(5)]
    cells[4] = replace(cells[4], forward_seconds=0.004, backward_seconds=0.008)
    found = solve(cells, 2, micro_batches=8, memory_limit=[23 * 2**20, None])
    text = str(found)
    assert text.splitlines()[0] == (
        "2 stages, 8 micro-batches, gpipe: 129 ms a step (at most 0.00% above the best division), bubble 20.9%, "
        "recompute 4.7%"
    ), text
    assert found.binds == 1
    assert found.fullest == 0
    assert "0  3: c0 .. c2     3 ms      6 ms  65.1%   4/8  10.00 MiB   0 bytes    0 bytes    12.00 MiB" in text


def test_advice():
    even = [CellCost(f"c{i}", 0.001, 0.002, 2**20, 0, 0) for i in range(4)]
    assert "Time: the stages are even" in str(solve(even, 2, micro_batches=4))
    assert "Memory" not in str(solve(even, 2, micro_batches=4))
    roomy = str(solve(even, 2, micro_batches=4, memory_limit=10 * 2**20))
    assert "Memory: nothing is recomputed; stage 0 has least left, 2.00 MiB." in roomy
    tight = solve(even, 2, micro_batches=4, memory_limit=[5 * 2**20, 10 * 2**20])
    assert tight.keep == (2, 4)
    assert "Memory: stage 0 recomputes 2 micro-batches, 4 ms a step: 1.00 MiB more would keep one more, 3.00" in str(
        tight
    )
    chosen = str(solve(even, 2, micro_batches=4, keep=1, memory_limit=10 * 2**20))
    assert "though more fit: keep=None keeps as many as fit" in chosen
    uneven = [*even, CellCost("head", 0.01, 0.02, 1, 1, 1)]
    assert "stage 1 (head) is busy" in str(solve(uneven, 2, micro_batches=4))
    assert "it is a single cell" in str(solve(uneven, 2, micro_batches=4))


def test_a_partition_is_plain_data():
    found = solve(chain(np.random.default_rng(0), 9), 3, micro_batches=4, memory_limit=10**9, links=(0.0, 1e9))
    assert json.loads(json.dumps(asdict(found)))["stages"][1]["cells"] == found.balance[1]
    assert all(type(q) is int for q in (*found.balance, *found.keep, *found.bytes))
    assert type(found.seconds) is type(found.bubble) is float


# --- bad input -------------------------------------------------------------------------------------------------------

CELLS = [CellCost(f"c{i}", 1.0, 2.0, 1, 1, 1) for i in range(5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": []}, "costs: expected at least one cell, got none"),
        ({"costs": [1]}, "costs: expected a sequence of CellCost, got int among them"),
        ({"stages": 6}, "stages: expected a whole number, 1 to 5, the number of cells: there are 5.*got 6"),
        ({"stages": 0}, "stages: expected a whole number, 1 to 5.*got 0"),
        ({"stages": 1.5}, r"stages: .*got 1\.5"),
        ({"micro_batches": 0}, "micro_batches: expected a whole number, 1 or more, got 0"),
        ({"micro_batches": True}, "micro_batches: .*got True"),
        ({"schedule": "zb"}, "schedule: expected one of gpipe, 1f1b, got 'zb'"),
        ({"memory_limit": "20GiB"}, "memory_limit: expected a whole number, 1 or more, in bytes, got '20GiB'"),
        ({"memory_limit": -1}, "memory_limit: .*got -1"),
        ({"memory_limit": math.nan}, "memory_limit: .*got nan"),
        ({"memory_limit": [1, 2, 3]}, r"memory_limit: expected 2 bytes, one per stage, got 3: \[1, 2, 3\]"),
        ({"keep": 5}, "keep: expected a whole number, 0 to 4, the number of micro-batches, got 5"),
        ({"keep": [1]}, r"keep: expected 2 numbers of micro-batches, one per stage, got 1: \[1\]"),
        ({"static_bytes_per_param": -1}, "static_bytes_per_param: expected a finite number, 0 or more, got -1"),
        ({"device_speeds": [1, 0]}, "device_speeds: expected a finite number, above 0, got 0"),
        ({"device_speeds": [1]}, r"device_speeds: expected 2 relative speeds, one per stage, got 1"),
        ({"links": (1e-6, 0)}, "links: bandwidth in bytes per second: expected a finite number, above 0, got 0"),
        ({"links": (-1, 1)}, "links: latency in seconds: expected a finite number, 0 or more, got -1"),
        ({"links": [(0, 1), (0, 1)]}, "links: expected one pair or 1 for 2 stages, got 2"),
        ({"links": 3}, "links: expected pairs .*got 3"),
        (
            {"costs": [*CELLS[:4], replace(CELLS[4], skips=(SkipCost(2, 1),))]},
            "costs: cell 'c4' stashes a value for a cell 2 further on, but only 0 follow it",
        ),
        ({"costs": [replace(CELLS[0], skips=(SkipCost(1, 2**61),)), *CELLS]}, "are out of range: check the units"),
        ({"input_bytes": -1}, "input_bytes: expected a whole number, 0 or more, got -1"),
        ({"costs": [replace(CELLS[0], activation_bytes=2**61)] * 2}, "are out of range: check the units"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    given = {"costs": CELLS, "stages": 2, "micro_batches": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        solve(**given)
