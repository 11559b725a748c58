"""The simulator: closed forms, an independent longest path, links, memory, what is refused."""

import math
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import legal_schedules

from gpipe.partitioning.makespan import Divided, gpipe_seconds, one_f_one_b_seconds
from gpipe.schedule import ScheduleError
from gpipe.schedules import (
    BUILDERS,
    gpipe,
    gpipe_zero_bubble,
    interleaved_one_f_one_b,
    one_f_one_b,
    with_recompute,
    zero_bubble_h1,
)
from gpipe.simulate import StageCost, simulate

UNIT = StageCost(1, 1, 1, activation_bytes=1)
SECONDS = [(1, 1, 1), (2, 3, 1), (1, 2, 4), (3, 1, 2)]  # of F, I, W; whole, so that sums are exact
GRID = [(k, m) for k in range(1, 7) for m in (1, 2, 3, 5, 8, 13)]


def bubble(timeline, cost, micro_batches, stages_per_worker=1):
    """Makespan less one worker's work; equal to what its ``bubble`` says."""
    one = cost.forward_seconds + cost.input_gradient_seconds + cost.weight_gradient_seconds
    work = micro_batches * one * stages_per_worker
    assert timeline.bubble == pytest.approx(1 - work / timeline.makespan, abs=1e-12)
    return timeline.makespan - work


# --- published closed forms (p = K, m = M, A = 1)


@pytest.mark.parametrize("seconds", SECONDS)
def test_closed_forms(seconds):
    f, i, w = seconds
    cost = StageCost(f, i, w, activation_bytes=1)
    for p, m in GRID:
        found = simulate(gpipe(p, m), cost)
        assert bubble(found, cost, m) == (p - 1) * (f + i + w)
        assert found.peak_bytes == (m,) * p

        found = simulate(one_f_one_b(p, m), cost)
        assert bubble(found, cost, m) == (p - 1) * (f + i + w)
        assert found.peak_bytes == tuple(min(p - k, m) for k in range(p))

        found = simulate(gpipe_zero_bubble(p, m), cost)
        assert bubble(found, cost, m) == (p - 1) * (f + i)
        assert found.peak_bytes == (m,) * p

        found = simulate(zero_bubble_h1(p, m), cost)
        if m >= p and w <= min(f, i):
            assert bubble(found, cost, m) == (p - 1) * (f + i - w)  # the paper's, which needs W to fit the gaps
        assert bubble(found, cost, m) == (p - 1) * (f + i) - (min(p, m) - 1) * min(f, i, w)
        assert found.peak_bytes == (min(p, m),) * p


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("v", [1, 2, 3])
def test_closed_form_of_interleaving(seconds, v):
    """For m a multiple of p. F, B and A are one stage's here, a v-th of the paper's, which are a worker's."""
    cost = StageCost(*seconds, activation_bytes=1)
    for p in range(1, 6):
        for m in (p, 2 * p, 3 * p):
            found = simulate(interleaved_one_f_one_b(p * v, m, stages_per_worker=v), cost)
            assert bubble(found, cost, m, v) == (p - 1) * sum(seconds)
            warm = p * v + p - 1  # p A (1 + (p - 1) / (p v)) with A = v stages
            assert found.worker_memory[0].peak == min(warm, m * v)
            assert max(memory.peak for memory in found.worker_memory) == min(warm, m * v)


def test_interleaving_of_any_number_of_micro_batches_beats_none():
    for p in (2, 3, 4):
        for m in range(p + 1, 4 * p):
            interleaved = simulate(interleaved_one_f_one_b(2 * p, m), StageCost(1, 1, 1)).makespan
            assert interleaved < simulate(one_f_one_b(p, m), StageCost(2, 2, 2)).makespan


def test_closed_form_of_recompute():
    """gpipe_remat: bytes m boundary + A, and a recompute less if the last is kept."""
    cost = StageCost(1, 1, 1, activation_bytes=100, boundary_bytes=3)
    for p, m in GRID:
        for keep in (0, 1):
            found = simulate(with_recompute(gpipe(p, m), keep), cost, input_bytes=3)
            assert found.peak_bytes == (3 * m + 100,) * p
            assert found.makespan == (m + p - 1) * 3 + m - keep


def test_issue_4_ideals():
    plain, split, h1 = (
        simulate(b(stages=2, micro_batches=4), UNIT).makespan for b in (gpipe, gpipe_zero_bubble, zero_bubble_h1)
    )
    assert plain / split == pytest.approx(1.07, abs=0.005)
    assert plain / h1 == pytest.approx(1.15, abs=0.005)


@pytest.mark.parametrize("seconds", SECONDS)
def test_no_flush_is_shorter_than_gpipe_zero_bubble(seconds):
    """Stage 0 has its first input gradient after all M forwards of the last stage and K I; M - 1 I and M W are left."""
    f, i, w = seconds
    for p, m in GRID:
        bound = (p - 1 + m) * f + p * i + (m - 1) * i + m * w
        assert simulate(gpipe_zero_bubble(p, m), StageCost(f, i, w)).makespan == bound


# --- against an independent computation


def longest_path(schedule, costs, links):
    """Start and end of every action by plain recursion to a fixed point, an action at a time."""
    times, free, arrived = {}, defaultdict(float), {}
    lists = [list(w) for w in schedule.workers]
    clock = [0.0] * len(lists)
    host = {a.stage: w for w, actions in enumerate(lists) for a in actions}
    while any(lists):
        for w, actions in enumerate(lists):
            while actions:
                k, kind, m = action = actions[0]
                before = {"F": k - 1, "B": k + 1, "I": k + 1}.get(kind, -1)
                sense = "F" if kind == "F" else "B"
                if before in host and (before, sense, m) not in arrived:
                    break
                actions.pop(0)
                cost = costs[k]
                parts = {"F": "F", "R": "F", "B": "IW", "I": "I", "W": "W"}[kind]
                named = {"F": "forward_seconds", "I": "input_gradient_seconds", "W": "weight_gradient_seconds"}
                start = max(clock[w], arrived.get((before, sense, m), 0.0) if before in host else 0.0)
                end = clock[w] = start + sum(getattr(cost, named[p]) for p in parts)
                times[action] = (start, end)
                after = k + 1 if kind == "F" else k - 1
                if kind in "FBI" and after in host:
                    arrived[k, sense, m] = end
                    if links and host[after] != host[k]:
                        edge = min(k, after)
                        leaves = max(end, free[edge, sense])
                        size = costs[edge].boundary_bytes
                        size += sum(s[1] for there, c in enumerate(costs) for s in c.skips if s[0] <= edge < there)
                        free[edge, sense] = leaves + size / links[edge][1]
                        arrived[k, sense, m] = free[edge, sense] + links[edge][0]
    return times, arrived


def held(schedule, costs, times, arrived, k, input_bytes):
    """The most bytes of a stage: looked at just after every moment at which something begins."""
    cost = costs[k]
    holds = [(0.0, math.inf, cost.parameter_bytes)]
    every = {(a.stage, a.kind, a.micro_batch): times[a] for w in schedule.workers for a in w}
    kinds = {(kind, m): span for (stage, kind, m), span in every.items() if stage == k}
    made = min(end for (kind, _), (_, end) in kinds.items() if kind in "BI")
    holds.append((made, math.inf, cost.parameter_bytes))  # gradients
    holds += [(*span, cost.workspace_bytes) for span in kinds.values()]
    for m in range(schedule.micro_batches):
        backward = kinds.get(("B", m)) or kinds[("I", m)]
        done = (kinds.get(("B", m)) or kinds[("W", m)])[1]
        came = arrived[k - 1, "F", m] if k else 0.0
        holds.append((came, backward[1], costs[k - 1].boundary_bytes if k else input_bytes))
        holds.append((kinds.get(("R", m), kinds["F", m])[0], done, cost.activation_bytes))
        if ("R", m) in kinds:
            holds.append((*kinds["F", m], cost.activation_bytes))
        for source, value, kept, _ in cost.skips:
            recorded = kinds.get(("R", m), kinds["F", m])[1]
            holds += [(every[source, "F", m][1], recorded, value), (recorded, backward[1], kept)]
            if ("R", m) in kinds:
                holds.append((*kinds["F", m], value))
        for target, other in enumerate(costs):
            back = [every[target, kind, m][1] for kind in "BI" if (target, kind, m) in every]
            holds += [(min(back), backward[1], size) for source, _, _, size in other.skips if source == k]
        if k + 1 < schedule.stages:
            holds.append((arrived[k + 1, "B", m], backward[0], cost.boundary_bytes))
    return max(sum(size for begin, end, size in holds if begin <= now < end) for now, _, _ in holds)


whole = st.integers(0, 5)
stage_cost = st.builds(StageCost, whole, whole, whole, whole, st.sampled_from([0, 1, 2, 4, 8]), whole, whole)


@given(legal_schedules(), st.data())
@settings(max_examples=120, deadline=None)
def test_against_the_longest_path(schedule, data):
    costs = [data.draw(stage_cost) for _ in range(schedule.stages)]
    if schedule.stages > 1 and data.draw(st.booleans()):
        for k in range(1, schedule.stages):
            skip = st.tuples(st.integers(0, k - 1), whole, whole, whole)
            costs[k] = replace(costs[k], skips=data.draw(st.lists(skip, max_size=2)))
    pair = st.tuples(st.sampled_from([0, 0.5, 3]), st.sampled_from([0.5, 1, 4, math.inf]))
    links = data.draw(st.none() | st.just([data.draw(pair) for _ in range(schedule.stages - 1)]))
    found = simulate(schedule, costs, links, input_bytes=7, static_bytes_per_param=2.0)
    times, arrived = longest_path(schedule, costs, links)
    assert {s.action: (s.start, s.end) for spans in found.workers for s in spans} == times
    sent = {(t.source, "F" if t.direction == "forward" else "B", t.micro_batch): t.end for t in found.transfers}
    assert sent.items() <= arrived.items()
    peaks = tuple(held(schedule, costs, times, arrived, k, 7) for k in range(schedule.stages))
    assert found.peak_bytes == peaks
    assert max(m.peak for m in found.worker_memory) >= max(peaks)


# --- against the partition solver's own formulas


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_partition_solver_predicts_the_same(data):
    stages, micro_batches = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    costs = [data.draw(stage_cost) for _ in range(stages)]
    keep = [data.draw(st.integers(0, micro_batches)) for _ in range(stages)]
    links = [(data.draw(whole), data.draw(st.sampled_from([0.5, 2, 8]))) for _ in range(stages - 1)]
    occupied = [0.0, *(cost.boundary_bytes / bandwidth for cost, (_, bandwidth) in zip(costs, links, strict=False))]
    latency = [0.0, *(seconds for seconds, _ in links)]
    division = Divided(
        *(
            np.array([row], dtype=kind)
            for row, kind in (
                ([c.forward_seconds for c in costs], float),
                ([c.input_gradient_seconds + c.weight_gradient_seconds for c in costs], float),
                (keep, np.int64),
                ([o + wait for o, wait in zip(occupied, latency, strict=True)], float),
                (occupied, float),
            )
        )
    )
    for builder, formula in ((gpipe, gpipe_seconds), (one_f_one_b, one_f_one_b_seconds)):
        found = simulate(with_recompute(builder(stages, micro_batches), keep), costs, links)
        assert found.end == pytest.approx(formula(division, micro_batches)[0])


# --- links


def test_a_message_takes_latency_and_bytes_over_bandwidth():
    cost = StageCost(1, 1, 1, boundary_bytes=10)
    found = simulate(gpipe(2, 1), cost, (0.5, 5.0))
    assert list(found.transfers) == [(0, 1, "forward", 0, 1.0, 3.5), (1, 0, "backward", 0, 6.5, 9.0)]
    assert found.makespan == 11
    assert found.communication == (2.5 / 11, 2.5 / 11)


def test_messages_queue_behind_each_other_in_one_direction():
    cost = StageCost(1, 1, 1, boundary_bytes=10)
    found = simulate(gpipe(2, 3), cost, (0.5, 5.0))
    forward = [(t.start, t.end) for t in found.transfers if t.direction == "forward"]
    assert forward == [(1, 3.5), (3, 5.5), (5, 7.5)]


def test_stages_of_one_worker_hand_over_at_no_cost():
    found = simulate(interleaved_one_f_one_b(2, 3), StageCost(1, 1, 1, boundary_bytes=10), (9.0, 1.0))
    assert found.makespan == 3 * 2 * 3
    assert list(found.transfers) == []


def test_each_neighbouring_pair_has_its_link():
    cost = StageCost(1, 1, 1, boundary_bytes=1)
    found = simulate(gpipe(3, 1), cost, [(0.0, math.inf), (2.0, 1.0)])
    assert [(t.source, t.end - t.start) for t in found.transfers] == [(0, 0), (1, 3), (1, 0), (2, 3)]


# --- memory and flush


def test_memory_over_time():
    cost = StageCost(2, 1, 1, activation_bytes=10, boundary_bytes=3, parameter_bytes=5)
    found = simulate(with_recompute(gpipe(2, 2), 1), cost, input_bytes=1, static_bytes_per_param=1.5)
    assert list(found.memory[0]) == [
        (0, 6 + 2 + 10),  # parameters rounded up, both inputs; the first forward drops activations, the second keeps
        (10, 8 + 1 + 10),  # whose backward has ended and made gradients; the recompute begins
        (14, 8),
    ]


def test_a_gradient_that_waits_is_held():
    slow = StageCost(10, 1, 1, boundary_bytes=3)
    found = simulate(with_recompute(gpipe(2, 1), 0), [slow, StageCost(1, 1, 1)])
    assert list(found.memory[0]) == [(0, 0), (14, 3), (20, 0)]


def test_what_skips_stages_waits_at_its_ends():
    last = StageCost(1, 1, 1, skips=[(0, 100, 10, 7)])
    costs = [StageCost(1, 1, 1), StageCost(2, 1, 1), last]
    three = simulate(one_f_one_b(3, 2), costs)
    # stage 2 has the values of both micro-batches from 1 and 2 on, uses them in F at 3 to 4, 6 to 7, and keeps a tenth
    assert list(three.memory[2]) == [(0, 0), (1, 100), (2, 200), (4, 110), (6, 100), (7, 10), (9, 0)]
    # stage 0 has the gradient of one from 6, as stage 2 has gone backward, to 11
    assert list(three.memory[0])[:3] == [(0, 0), (6, 7), (9, 14)]
    assert three.peak_bytes[1] == 0
    again = simulate(with_recompute(gpipe(3, 2), 0), costs)
    assert again.peak_bytes[2] == 300  # such a forward works on a copy
    split = simulate(gpipe_zero_bubble(3, 2), costs)
    assert split.peak_bytes[0] == 14


def test_what_skips_stages_goes_over_all_links_on_its_way():
    costs = [StageCost(1, 1, 1, boundary_bytes=10) for _ in range(3)]
    costs[2] = StageCost(1, 1, 1, skips=[(0, 30, 0, 30)])
    found = simulate(gpipe(3, 1), costs, [(0.5, 10), (0, 20)])
    assert [(t.start, t.end) for t in found.transfers][:2] == [(1, 5.5), (6.5, 8.5)]
    near = simulate(gpipe(3, 1), [costs[0], StageCost(1, 1, 1, 0, 10, skips=[(0, 30, 0, 30)]), costs[0]], (0, 10))
    assert [(t.start, t.end) for t in near.transfers][:2] == [(1, 5), (6, 7)]


def test_split_backwards_hold_activations_until_w():
    cost = StageCost(1, 1, 1, activation_bytes=10)
    assert list(simulate(gpipe_zero_bubble(1, 2), cost).memory[0]) == [(0, 10), (1, 20), (5, 10), (6, 0)]


def test_rounding_holds_nothing_twice():
    """Times that sum to the same in another order are the same: no input or gradient waits for an instant."""
    cost = StageCost(0.1, 0.3, 0.7, activation_bytes=0, boundary_bytes=1)
    exact = StageCost(1, 3, 7, activation_bytes=0, boundary_bytes=1)
    for builder in (gpipe, one_f_one_b, zero_bubble_h1):
        assert simulate(builder(5, 9), cost).peak_bytes == simulate(builder(5, 9), exact).peak_bytes


def test_optimizer_and_all_reduce_follow_every_workers_last_action():
    found = simulate(gpipe(2, 1), UNIT, all_reduce_seconds=2, optimizer_seconds=0.5)
    assert [tuple(part) for part in found.flush] == [
        (0, "all_reduce", 6, 8),
        (0, "optimizer", 8, 8.5),
        (1, "all_reduce", 4, 6),
        (1, "optimizer", 6, 6.5),
    ]
    assert found.makespan == 8.5
    assert found.busy == (3.5 / 8.5, 3.5 / 8.5)
    assert found.communication == (2 / 8.5, 2 / 8.5)


def test_a_worker_without_actions_flushes_at_once():
    schedule = gpipe(1, 1)
    found = simulate(type(schedule)("spare", 1, 1, (*schedule.workers, ())), UNIT, optimizer_seconds=1)
    assert [tuple(part) for part in found.flush] == [(0, "optimizer", 3, 4), (1, "optimizer", 0, 1)]


# --- what is refused, and size


@pytest.mark.parametrize(
    ("field", "value", "error", "match"),
    [
        ("forward_seconds", -1, ValueError, "forward_seconds must be finite and at least 0, got -1"),
        ("weight_gradient_seconds", math.nan, ValueError, "weight_gradient_seconds must be finite"),
        ("input_gradient_seconds", math.inf, ValueError, "input_gradient_seconds must be finite"),
        ("forward_seconds", "1", TypeError, "forward_seconds must be a number, got str '1'"),
        ("forward_seconds", True, TypeError, "forward_seconds must be a number, got bool"),
        ("activation_bytes", 1.5, TypeError, "activation_bytes must be an int, got float 1.5"),
        ("boundary_bytes", -1, ValueError, r"boundary_bytes must be from 0 to 2\*\*62, got -1"),
        ("parameter_bytes", 2**63, ValueError, "parameter_bytes must be from 0"),
        (
            "skips",
            [(0, 1)],
            TypeError,
            r"skips must hold \(source, value_bytes, kept_bytes, gradient_bytes\) each, got \(0",
        ),
        ("skips", [(0, 1, -1, 0)], ValueError, r"skips: kept_bytes must be from 0 to 2\*\*62, got -1"),
    ],
)
def test_bad_costs_are_refused(field, value, error, match):
    given_costs = {"forward_seconds": 1, "input_gradient_seconds": 1, "weight_gradient_seconds": 1, field: value}
    with pytest.raises(error, match=match):
        StageCost(**given_costs)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"costs": [UNIT]}, ValueError, "costs gives 1 for 3 stages: give one StageCost per stage, or one for all"),
        ({"costs": [1, 1, 1]}, TypeError, "costs must be a StageCost, or one per stage, got int 1"),
        ({"links": [(0, 1)]}, ValueError, r"links gives 1 for 3 stages: .*or 2 such pairs"),
        ({"links": (0, 0)}, ValueError, "a link's bandwidth must be above 0 bytes per second, got 0"),
        ({"links": (-1, 1)}, ValueError, "a link's latency must be finite and at least 0, got -1"),
        ({"links": [1, 2, 3]}, ValueError, "links gives 3 for 3 stages"),
        ({"links": [(0, 1), 7]}, TypeError, r"a link must be \(latency .*, got 7"),
        ({"links": (0, math.nan)}, ValueError, "bandwidth must be above 0"),
        ({"input_bytes": -1}, ValueError, "input_bytes must be from 0"),
        ({"static_bytes_per_param": -1}, ValueError, "static_bytes_per_param must be finite"),
        ({"optimizer_seconds": None}, TypeError, "optimizer_seconds must be a number, got NoneType None"),
        ({"all_reduce_seconds": math.nan}, ValueError, "all_reduce_seconds must be finite"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        simulate(**{"schedule": gpipe(3, 2), "costs": UNIT, **arguments})


def test_skips_come_from_stages_before():
    with pytest.raises(ValueError, match=r"stage 0 has skips from stage 0, expected ones from stages before it"):
        simulate(gpipe(3, 2), StageCost(1, 1, 1, skips=[(0, 1, 1, 1)]))


def test_illegal_schedules_are_refused():
    half = gpipe(2, 2)
    with pytest.raises(ScheduleError, match="1F0 is missing"):
        simulate(type(half)("half", 2, 2, half.workers[:1]), UNIT)


def test_no_stages_and_no_seconds():
    assert simulate(gpipe(0, 1), []).makespan == 0
    assert simulate(gpipe(2, 2), StageCost(0, 0, 0)).bubble == 0


def test_many_stages_and_micro_batches():
    """Sixteenth of the 1,024 x 4,096 that take 9 s and 1.8 GiB on a free core."""
    begin = time.perf_counter()
    found = simulate(with_recompute(gpipe(256, 1024), 1), UNIT, (0.0, 1.0))
    assert found.makespan == (1024 + 255) * 3 + 1023
    assert time.perf_counter() - begin < 20
    for name in BUILDERS:
        assert simulate(BUILDERS[name](64, 256), UNIT).makespan > 3 * 256
