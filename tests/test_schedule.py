"""Schedules as data: the pictures of them, and what is refused."""

import copy
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torchs

from gpipe import Action, Kind, Schedule, ScheduleError
from gpipe.actions import Actions
from gpipe.schedules import BUILDERS, gpipe, gpipe_zero_bubble, with_recompute


def read(name, *workers, stages=None, micro_batches=None):
    """A schedule from lines such as "0F0 0F1 0B1 0B0"."""
    actions = tuple(tuple(Action(int(a[0]), Kind(a[1]), int(a[2:])) for a in worker.split()) for worker in workers)
    every = [a for worker in actions for a in worker]
    return Schedule(
        name,
        1 + max(a.stage for a in every) if stages is None else stages,
        1 + max(a.micro_batch for a in every) if micro_batches is None else micro_batches,
        actions,
    )


def picture(text):
    return "\n".join(line.strip() for line in text.strip().splitlines())


def test_actions_print_as_in_torch():
    assert str(Action(2, Kind.FORWARD, 0)) == "2F0"
    assert str(Action(0, Kind.RECOMPUTE, 13)) == "0R13"


def test_gpipe():
    assert gpipe(3, 4).validate().render() == picture(
        """
        worker 0: 0F0 0F1 0F2 0F3                 0B3 0B2 0B1 0B0
        worker 1:     1F0 1F1 1F2 1F3         1B3 1B2 1B1 1B0
        worker 2:         2F0 2F1 2F2 2F3 2B3 2B2 2B1 2B0
        """
    )


def test_recompute_stands_before_the_wait_for_the_gradient():
    schedule = with_recompute(gpipe(3, 3), [1, 0, 3]).validate()
    assert schedule.render() == picture(
        """
        worker 0: 0F0 0F1 0F2                 0B2 0R1 0B1 0R0 0B0
        worker 1:     1F0 1F1 1F2 1R2     1B2 1R1 1B1 1R0 1B0
        worker 2:         2F0 2F1 2F2 2B2 2B1 2B0
        """
    )
    assert schedule.recomputed == {(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)}


def test_one_stage_one_micro_batch_and_none():
    assert gpipe(1, 1).validate().render() == "worker 0: 0F0 0B0"
    assert gpipe(0, 1).validate().render() == ""
    assert with_recompute(gpipe(1, 2), [0]).render() == "worker 0: 0F0 0F1 0R1 0B1 0R0 0B0"


def test_halves():
    forward, backward = with_recompute(gpipe(2, 2), [1, 1]).halves
    assert [[str(a) for a in worker] for worker in forward] == [["0F0", "0F1"], ["1F0", "1F1"]]
    assert [[str(a) for a in worker] for worker in backward] == [["0B1", "0R0", "0B0"], ["1B1", "1R0", "1B0"]]


def one_f_one_b():
    return read("1f1b", "0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2")


def test_interleaved_schedules_are_valid_but_have_no_halves():
    assert one_f_one_b().validate().render() == picture(
        """
        worker 0: 0F0 0F1     0B0 0F2 0B1     0B2
        worker 1:     1F0 1B0 1F1 1B1 1F2 1B2
        """
    )
    with pytest.raises(ScheduleError, match=r"'1f1b' interleaves.*worker 0 runs 0F2 after a backward.*'micro_batch'"):
        _ = one_f_one_b().halves


def test_a_worker_may_host_several_stages():
    schedule = read("looped", "0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0")
    assert schedule.validate().render() == picture(
        """
        worker 0: 0F0     2F0         2B0     0B0
        worker 1:     1F0     3F0 3B0     1B0
        """
    )


def test_a_schedule_that_never_ends_is_refused_with_its_picture():
    crossed = read("crossed", "0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError, match="'crossed' never ends") as caught:
        crossed.validate()
    assert str(caught.value) == (
        "schedule 'crossed' never ends: worker 0 at 0B0 waits for 1B0; worker 1 at 1F1 waits for 0F1. "
        "Reorder these actions.\n"
        "worker 0: 0F0    0B0<--\n"
        "worker 1:        1F0    1F1<--"
    )


@pytest.mark.parametrize(("keep", "recomputed"), [(0, {0, 1, 2}), (1, {0, 1}), (2, {0}), (3, set())])
def test_keep_counts_the_last_micro_batches(keep, recomputed):
    schedule = with_recompute(gpipe(2, 3), [keep, keep])
    assert {m for stage, m in schedule.recomputed if stage == 1} == recomputed


@pytest.mark.parametrize(
    ("workers", "match"),
    [
        (["0F0 0B0", "1B0 1F0"], r"'x' never ends: worker 0 at 0B0 waits for 1B0; worker 1 at 1B0 waits for 1F0"),
        (["0B0 0F0"], r"worker 0 at 0B0 waits for 0F0. Reorder these actions.\nworker 0: 0B0<--"),
        (["0R0 0F0 0B0"], r"worker 0 at 0R0 waits for 0F0"),
        (["0F0 0B0 0R0"], r"worker 0 at 0B0 waits for 0R0"),
        (
            ["0F0", "1F0 1B0"],
            r"'x': 0B0 is missing \(or I and W in its place\)\nworker 0: 0F0<--\nworker 1: 1F0    1B0",
        ),
        (["0F0 0B0 0B1"], r"'x': 0F1 is missing"),
        (["0F0 0F0 0B0"], r"'x': 0F0 stands 2 times\nworker 0: 0F0<-- 0F0<-- 0B0"),
        (["0F0 0R0 0R0 0B0"], r"'x': 0R0 stands 2 times"),
        (["0F0", "0B0"], r"0B0 is given to worker 1, but worker 0 hosts stage 0. Give a stage to one worker"),
    ],
)
def test_refused(workers, match):
    with pytest.raises(ScheduleError, match=match):
        read("x", *workers).validate()


@pytest.mark.parametrize("action", ["2F0", "0F5"])
def test_actions_outside_are_refused(action):
    with pytest.raises(ScheduleError, match=rf"'x': {action} of worker 0 is outside 2 stages and 1 micro-batches"):
        read("x", f"0F0 0B0 {action}", "1F0 1B0", stages=2, micro_batches=1).validate()


@pytest.mark.parametrize(
    ("workers", "match"),
    [
        (
            ["0F0 0B0 0I0"],
            r"'x': 0I0 computes again what B computes.*either B, or I and W\nworker 0: 0F0 {4}0B0 {4}0I0<--",
        ),
        (["0F0 0B0 0W0"], r"0W0 computes again what B computes"),
        (["0F0 0W0"], r"0I0 is missing: the weight gradient W follows an input gradient\nworker 0: 0F0<-- 0W0<--"),
        (["0F0 0I0"], r"0W0 is missing: the input gradient I alone is half a backward"),
        (["0F0 0R0"], r"0B0 is missing \(or I and W"),
        (["0F0 0I0 0I0 0W0"], r"0I0 stands 2 times"),
        (["0F0 0I0 0W0 0W0"], r"0W0 stands 2 times"),
        (["0F0 0W0 0I0"], r"never ends: worker 0 at 0W0 waits for 0I0"),
        (["0F0 0I0 0R0 0W0"], r"worker 0 at 0I0 waits for 0R0"),
        (["0F0 0I0 0W0", "1F0 1W0 1I0"], r"worker 0 at 0I0 waits for 1I0; worker 1 at 1W0 waits for 1I0"),
        (
            ["0F0 0I0 0F1 0W0 0B1", "1F0 1F1 1I0 1W0 1B1"],
            r"worker 0 at 0I0 waits for 1I0; worker 1 at 1F1 waits for 0F1",
        ),
    ],
)
def test_split_backwards_refused(workers, match):
    with pytest.raises(ScheduleError, match=match):
        read("x", *workers).validate()


def test_b_and_split_backwards_mix():
    schedule = read("mixed", "0F0 0I0 0W0 0F1 0B1", "1F0 1B0 1F1 1R1 1I1 1W1").validate()
    assert schedule.render() == picture(
        """
        worker 0: 0F0         0I0 0W0 0F1             0B1
        worker 1:     1F0 1B0             1F1 1R1 1I1 1W1
        """
    )
    assert schedule.recomputed == {(1, 1)}


def test_halves_of_split_backwards():
    forward, backward = with_recompute(gpipe_zero_bubble(stages=1, micro_batches=2), 1).halves
    assert [str(a) for a in forward[0]] == ["0F0", "0F1"]
    assert [str(a) for a in backward[0]] == ["0I1", "0W1", "0R0", "0I0", "0W0"]
    for name in ("one_f_one_b", "zero_bubble_h1", "interleaved_one_f_one_b"):
        with pytest.raises(ScheduleError, match=f"'{name}' interleaves.*'gpipe_zero_bubble'"):
            _ = BUILDERS[name](stages=2, micro_batches=3).halves


@pytest.mark.parametrize(
    ("workers", "match"),
    [
        ([["0F0"]], r"schedule 'x': expected an Action\(stage, kind, micro_batch\), got '0F0'"),
        ([[(0, "F")]], r"expected an Action\(stage, kind, micro_batch\)"),
        ([[Action(0.0, Kind.FORWARD, 0)]], r"stage of an action must be an int below 2\*\*31, got 0.0"),
        ([[Action(0, Kind.FORWARD, True)]], r"micro_batch of an action must be an int below 2\*\*31, got True"),
        ([[Action(0, Kind.FORWARD, 2**31)]], r"got 2147483648"),
        ([[Action(0, "Z", 0)]], r"kind of an action must be one of 'F', 'R', 'B', 'I', 'W', got 'Z'"),
    ],
)
def test_what_is_no_action_is_refused(workers, match):
    with pytest.raises(ScheduleError, match=match):
        Schedule("x", 1, 1, workers)


@pytest.mark.parametrize(("stages", "micro_batches"), [(-1, 1), (True, 1), (1, 0), (1, 1.0)])
def test_sizes_are_refused(stages, micro_batches):
    with pytest.raises(
        ScheduleError, match=r"schedule 'x': (stages|micro_batches) must be an int of at least [01], got"
    ):
        Schedule("x", stages, micro_batches, ())


def test_negative_indices_are_outside():
    with pytest.raises(ScheduleError, match=r"0F-1 of worker 0 is outside 1 stages and 1 micro-batches\nworker 0: 0F0"):
        Schedule("x", 1, 1, [[*gpipe(1, 1).workers[0], Action(0, Kind.FORWARD, -1)]]).validate()


def test_of_a_large_schedule_the_place_is_shown():
    workers = [list(w) for w in gpipe(40, 100).workers]
    workers[30][50], workers[30][100] = workers[30][100], workers[30][50]
    with pytest.raises(ScheduleError, match="never ends") as caught:
        Schedule("large", 40, 100, workers).validate()
    assert "never ends: worker 30 at 30B99 waits for 30F99, 31B99; 39 other workers wait too. Reorder" in str(
        caught.value
    )
    assert "30B99<--" in str(caught.value)
    assert "(40 workers, 16 shown)" in str(caught.value)
    assert len(str(caught.value)) < 5000


def test_thousands_of_actions_are_validated_in_moments():
    schedule = with_recompute(gpipe(64, 128), [1] * 64)
    start = time.perf_counter()
    schedule.validate()
    assert time.perf_counter() - start < 1  # 0.02 s on a free machine
    assert len(schedule.recomputed) == 64 * 127


def test_schedules_are_frozen_and_comparable():
    assert gpipe(2, 3) == gpipe(2, 3) != gpipe(3, 3)
    assert hash(gpipe(2, 3)) == hash(gpipe(2, 3))
    assert Schedule("gpipe", 2, 3, tuple(tuple(w) for w in gpipe(2, 3).workers)) == gpipe(2, 3)
    assert gpipe(2, 3).workers != gpipe_zero_bubble(2, 3).workers
    with pytest.raises(AttributeError, match="cannot assign to field 'name'"):
        gpipe(2, 3).name = "other"
    with pytest.raises(ValueError, match="read-only"):
        pickle.loads(pickle.dumps(gpipe(2, 3))).workers[0].stage[0] = 1
    assert pickle.loads(pickle.dumps(gpipe(2, 3).validate())) == copy.deepcopy(gpipe(2, 3)) == gpipe(2, 3)


def test_actions_are_a_sequence():
    actions = Actions.of([Action(0, Kind.FORWARD, 1), Action(2, Kind.WEIGHT_GRADIENT, 0)])
    assert list(actions) == [Action(0, Kind.FORWARD, 1), Action(2, Kind.WEIGHT_GRADIENT, 0)]
    assert actions[-1] == actions[np.int64(1)] == Action(2, Kind.WEIGHT_GRADIENT, 0)
    assert isinstance(actions[0].kind, Kind)
    assert type(actions[0].stage) is int
    assert actions[:1] == Actions.of(list(actions)[:1]) != actions
    assert Action(0, Kind.FORWARD, 1) in actions
    assert len(Actions.of([])) == 0
    assert repr(actions) == "Actions(2: 0F1, 2W0)"
    with pytest.raises(IndexError, match="there are 2, none at index 2"):
        _ = actions[2]


# --- legal and illegal at random


@st.composite
def legal_schedules(draw):
    """Workers with any stages, any split, any recompute, in any order in which a run could have performed it."""
    stages, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    hosts = draw(st.lists(st.integers(0, stages - 1), min_size=stages, max_size=stages))
    waiting = []
    for k in range(stages):
        for m in range(micro_batches):
            kinds = draw(st.sampled_from(["FB", "FIW", "FRB", "FRIW"]))
            waiting += [
                (Action(k, Kind(kind), m), [Action(k, Kind(x), m) for x in kinds[:i]]) for i, kind in enumerate(kinds)
            ]
    done, workers = [], [[] for _ in range(stages)]
    while waiting:
        ready = [(a, own) for a, own in waiting if all(n in done for n in own) and from_neighbour(a, stages, done)]
        chosen = ready[draw(st.integers(0, len(ready) - 1))]
        waiting.remove(chosen)
        done.append(chosen[0])
        workers[hosts[chosen[0].stage]].append(chosen[0])
    return Schedule("drawn", stages, micro_batches, tuple(map(tuple, workers)))


def from_neighbour(action, stages, done):
    k, kind, m = action
    if kind == "F":
        return k == 0 or (k - 1, "F", m) in done
    if kind in "BI":
        return k == stages - 1 or (k + 1, "B", m) in done or (k + 1, "I", m) in done
    return True


def legal(schedule):
    """Slowly: is everything there, and does playing the lists come to an end?"""
    lists = [list(w) for w in schedule.workers]
    for k in range(schedule.stages):
        here = [w for w in lists if any(a.stage == k for a in w)]
        if len(here) != 1:
            return False
        for m in range(schedule.micro_batches):
            kinds = "".join(a.kind for a in here[0] if (a.stage, a.micro_batch) == (k, m))
            if kinds not in ("FB", "FRB", "FIW", "FRIW"):
                return False
    done = []
    while any(lists):
        movable = [w for w in lists if w and from_neighbour(w[0], schedule.stages, done)]
        if not movable:
            return False
        for w in movable:
            done.append(w.pop(0))
    return True


@given(legal_schedules())
@settings(max_examples=60, deadline=None)
def test_legal_schedules_are_valid(schedule):
    assert legal(schedule)
    assert schedule.validate() is schedule


@given(legal_schedules(), st.data())
@settings(max_examples=150, deadline=None)
def test_corrupted_schedules_are_refused_unless_still_legal(schedule, data):
    workers = [list(w) for w in schedule.workers]
    places = [(w, i) for w, actions in enumerate(workers) for i in range(len(actions))]
    (w, i), (v, j) = data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))
    how = data.draw(st.sampled_from(["swap", "drop", "double", "rename"]))
    if how == "swap":
        workers[w][i], workers[v][j] = workers[v][j], workers[w][i]
    elif how == "drop":
        del workers[w][i]
    elif how == "double":
        workers[v].insert(j, workers[w][i])
    else:
        workers[w][i] = workers[w][i]._replace(kind=data.draw(st.sampled_from(list(Kind))))
    corrupted = Schedule("corrupted", schedule.stages, schedule.micro_batches, workers)
    if legal(corrupted):
        corrupted.validate()
    else:
        with pytest.raises(ScheduleError, match="schedule 'corrupted'"):
            corrupted.validate()


# --- files


def by_torch(path):
    """The file as torch's own reader takes it."""
    reader = SimpleNamespace(pipeline_order={}, _validate_and_set_stage_mapping=lambda order: None)
    torchs.PipelineScheduleMulti._load_csv(reader, str(path))
    return reader.pipeline_order


@pytest.mark.parametrize("name", BUILDERS)
def test_torch_reads_ours(name, tmp_path):
    schedule = BUILDERS[name](stages=4, micro_batches=6)
    schedule.to_csv(tmp_path / "ours.csv")
    order = by_torch(tmp_path / "ours.csv")
    assert [[str(a) for a in order[w]] for w in order] == [[str(a) for a in w] for w in schedule.workers]
    hosts = torchs._validate_schedule(order, len(schedule.workers), 4, 6)
    assert hosts == {k: w for w, actions in enumerate(schedule.workers) for k in {a.stage for a in actions}}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_csv_round_trip(name, recompute, tmp_path):
    schedule = BUILDERS[name](stages=4, micro_batches=3)
    if recompute:
        schedule = with_recompute(schedule, 1)
    schedule.to_csv(tmp_path / f"{name}.csv")
    assert Schedule.from_csv(tmp_path / f"{name}.csv") == schedule


def test_torch_refuses_recompute(tmp_path):
    with_recompute(gpipe(1, 1), 0).to_csv(tmp_path / "ours.csv")
    with pytest.raises(RuntimeError, match="Invalid action string: 0R0"):
        by_torch(tmp_path / "ours.csv")


@pytest.mark.parametrize("kind", ["ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble"])
def test_we_read_torchs(kind, tmp_path):
    settings = SimpleNamespace(n_local_stages=2, microbatches_per_round=2, pp_group_size=2, _n_microbatches=4)
    rows = {w: getattr(torchs, kind)._calculate_single_rank_operations(settings, w) for w in range(2)}
    torchs.PipelineScheduleMulti._dump_csv(SimpleNamespace(pipeline_order=rows), tmp_path / "torch.csv")
    read = Schedule.from_csv(tmp_path / "torch.csv")
    assert (read.name, read.stages, read.micro_batches) == ("torch", 4, 4)
    assert [list(map(str, w)) for w in read.workers] == [[str(a) for a in rows[w] if a is not None] for w in rows]


def test_overlapped_pairs_are_taken_one_after_the_other(tmp_path):
    (tmp_path / "x.csv").write_text("0F0,,(0F1;0B0)OVERLAP_F_B,0I1,0W1\n")
    read = Schedule.from_csv(tmp_path / "x.csv", name="dual")
    assert (read.name, list(map(str, read.workers[0]))) == ("dual", ["0F0", "0F1", "0B0", "0I1", "0W1"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "holds no actions: expected a line a rank"),
        ("0F0,0SEND_F0", r"x.csv, line 1: expected \[stage\].*got '0SEND_F0'.*format='compute_only'"),
        ("0F0,0B0\n1F0,B0", r"line 2: .*got 'B0'"),
        ("0F0", "'x': 0B0 is missing"),
    ],
)
def test_bad_files_are_refused(text, match, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ScheduleError, match=match):
        Schedule.from_csv(tmp_path / "x.csv")


def test_without_torch():
    program = (
        "import sys, types; sys.modules['gpipe'] = package = types.ModuleType('gpipe'); package.__path__ = ['gpipe']\n"
        "import gpipe.schedules, gpipe.simulate; s = gpipe.schedules.gpipe(2, 2)\n"
        "gpipe.simulate.simulate(s, gpipe.simulate.StageCost(1, 1, 1)).render()\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
