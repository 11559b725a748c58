"""The builders of schedules, and the pass that adds recompute: pictures, sums, what is refused."""

from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torchs

from gpipe import schedules
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


def picture(text):
    return "\n".join(line.strip() for line in text.strip().splitlines())


def texts(schedule):
    return [[str(action) for action in actions] for actions in schedule.workers]


PICTURES = {
    one_f_one_b: """
        worker 0: 0F0 0F1 0F2         0B0 0F3 0B1     0B2     0B3
        worker 1:     1F0 1F1     1B0 1F2 1B1 1F3 1B2     1B3
        worker 2:         2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """,
    zero_bubble_h1: """
        worker 0: 0F0 0F1 0F2         0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
        worker 1:     1F0 1F1     1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
        worker 2:         2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """,
    gpipe_zero_bubble: """
        worker 0: 0F0 0F1 0F2 0F3                 0I3 0I2 0I1 0I0 0W3 0W2 0W1 0W0
        worker 1:     1F0 1F1 1F2 1F3         1I3 1I2 1I1 1I0 1W3 1W2 1W1 1W0
        worker 2:         2F0 2F1 2F2 2F3 2I3 2I2 2I1 2I0 2W3 2W2 2W1 2W0
    """,
}


@pytest.mark.parametrize("builder", PICTURES, ids=lambda b: b.__name__)
def test_pictures(builder):
    assert builder(stages=3, micro_batches=4).validate().render() == picture(PICTURES[builder])


def test_interleaved():
    schedule = interleaved_one_f_one_b(stages=4, micro_batches=2, stages_per_worker=2).validate()
    assert schedule.render() == picture(
        """
        worker 0: 0F0 0F1 2F0 2F1     2B0     2B1 0B0 0B1
        worker 1:     1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1
        """
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("v", [1, 2, 3])
def test_interleaved_is_torchs_where_workers_divide_micro_batches(workers, v):
    for rounds in (1, 2, 3):
        micro_batches = workers * rounds
        like = SimpleNamespace(
            n_local_stages=v, microbatches_per_round=workers, pp_group_size=workers, _n_microbatches=micro_batches
        )
        rows = [torchs.ScheduleInterleaved1F1B._calculate_single_rank_operations(like, w) for w in range(workers)]
        ours = interleaved_one_f_one_b(stages=workers * v, micro_batches=micro_batches, stages_per_worker=v)
        assert texts(ours) == [[str(a) for a in row if a is not None] for row in rows]


def test_interleaved_runs_for_any_number_of_micro_batches():
    for v in range(1, 4):
        for workers in range(1, 6):
            for micro_batches in range(1, 14):
                schedule = interleaved_one_f_one_b(workers * v, micro_batches, stages_per_worker=v).validate()
                assert [sorted({a.stage for a in w}) for w in schedule.workers] == [
                    list(range(w, workers * v, workers)) for w in range(workers)
                ]


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_h1_is_torchs_zero_bubble_with_one_stage_per_worker(stages):
    for micro_batches in range(stages, 3 * stages):
        like = SimpleNamespace(
            n_local_stages=1, microbatches_per_round=stages, pp_group_size=stages, _n_microbatches=micro_batches
        )
        kind = torchs.ScheduleInterleavedZeroBubble
        rows = [kind._calculate_single_rank_operations(like, w) for w in range(stages)]
        expected = [[str(a) for a in row if a is not None] for row in rows]
        assert texts(zero_bubble_h1(stages, micro_batches)) == expected


def test_every_builder_is_valid():
    for name in BUILDERS:
        for stages in (2, 4, 6):
            for micro_batches in range(1, 9):
                for keep in range(micro_batches + 1):
                    schedule = BUILDERS[name](stages=stages, micro_batches=micro_batches).validate()
                    with_recompute(schedule, keep).validate()


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"stages": -2}, ValueError, r"stages must be at least [01], got -2"),
        ({"stages": True}, TypeError, r"stages must be an int of at least [01], got bool True"),
        ({"stages": 2.0}, TypeError, r"stages must be an int of at least [01], got float 2.0"),
        ({"micro_batches": 0}, ValueError, r"micro_batches must be at least 1, got 0"),
        ({"micro_batches": "4"}, TypeError, r"micro_batches must be an int of at least 1, got str '4'"),
    ],
)
def test_bad_sizes_are_refused(name, wrong, error, match):
    with pytest.raises(error, match=match):
        BUILDERS[name](**{"stages": 2, "micro_batches": 4, **wrong})


def test_no_stages():
    assert gpipe(0, 1).validate().workers == ()
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        one_f_one_b(0, 1)


@pytest.mark.parametrize(
    ("stages", "v", "error", "match"),
    [
        (5, 2, ValueError, r"stages must be a multiple of stages_per_worker, got 5 and 2: take 4 stages"),
        (2, 4, ValueError, r"got 2 and 4: take 4 stages"),
        (4, 0, ValueError, r"stages_per_worker must be at least 1, got 0"),
        (4, 1.5, TypeError, r"stages_per_worker must be an int of at least 1, got float 1.5"),
    ],
)
def test_bad_interleaving_is_refused(stages, v, error, match):
    with pytest.raises(error, match=match):
        interleaved_one_f_one_b(stages=stages, micro_batches=4, stages_per_worker=v)


def test_builders_by_name():
    assert schedules.builder("zero_bubble_h1") is zero_bubble_h1
    assert all(BUILDERS[name](stages=2, micro_batches=2).name == name for name in BUILDERS)
    for unknown in ("1f1b", None, ["gpipe"]):
        with pytest.raises(ValueError, match=r"schedule must be one of 'gpipe', .*'zero_bubble_h1'.* got"):
            schedules.builder(unknown)


# --- recompute


def test_recompute_in_split_schedules_leaves_no_weight_gradient_waiting():
    expected = {
        0: "0F0 0F1 0F2 0R2 0I2 0W2 0R1 0I1 0W1 0R0 0I0 0W0",
        1: "0F0 0F1 0F2 0I2 0W2 0R1 0I1 0W1 0R0 0I0 0W0",
        2: "0F0 0F1 0F2 0I2 0I1 0W2 0W1 0R0 0I0 0W0",
        3: "0F0 0F1 0F2 0I2 0I1 0I0 0W2 0W1 0W0",
    }
    for keep, actions in expected.items():
        assert texts(with_recompute(gpipe_zero_bubble(1, 3), keep)) == [actions.split()]


def test_one_f_one_b_keeps_the_first():
    schedule = with_recompute(one_f_one_b(2, 3), [1, 2])
    assert texts(schedule) == [
        "0F0 0F1 0B0 0F2 0R1 0B1 0R2 0B2".split(),
        "1F0 1B0 1F1 1B1 1F2 1R2 1B2".split(),
    ]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("micro_batches", [1, 3, 4, 6])
def test_keep_bounds_activations_and_recompute_costs_no_bytes(name, micro_batches):
    plain = BUILDERS[name](stages=4, micro_batches=micro_batches)
    without = simulate(plain, StageCost(2, 2, 1, activation_bytes=1))
    for keep in range(micro_batches + 1):
        schedule = with_recompute(plain, keep)
        assert len(schedule.recomputed) == 4 * (micro_batches - keep)
        peaks = simulate(schedule, StageCost(2, 2, 1, activation_bytes=1)).peak_bytes
        assert all(with_it <= before for with_it, before in zip(peaks, without.peak_bytes, strict=True))
        # one more while a forward runs whose activations are dropped: only where such a forward follows a kept one
        flush = name in ("gpipe", "gpipe_zero_bubble")
        assert max(peaks) <= max(keep, 1) + (not flush)


@pytest.mark.parametrize("stages", [2, 4])
def test_the_hoisted_recompute_runs_in_the_bubble(stages):
    timeline = simulate(with_recompute(gpipe(stages, 4), 0), StageCost(1, 1, 1))
    first = timeline.workers[0]
    recompute, backward = first[4], first[5]
    assert (str(recompute.action), recompute.start) == ("0R3", 4)
    assert backward.start > recompute.end
    assert timeline.makespan == (4 + stages - 1) * 3 + 4  # behind the wait it would be 4 + stages - 1 more


@pytest.mark.parametrize("keep", range(5))
def test_recompute_keeps_the_short_drain_of_gpipe_zero_bubble(keep):
    for stages in range(1, 5):
        whole = simulate(with_recompute(gpipe(stages, 4), keep), StageCost(1, 1, 1)).makespan
        split = simulate(with_recompute(gpipe_zero_bubble(stages, 4), keep), StageCost(1, 1, 1)).makespan
        assert whole - split == stages - 1


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        (True, TypeError, "keep must be an int"),
        ("all", TypeError, "keep must be an int, .* got 'all'"),
        ([1.0, 1], TypeError, "keep must be an int"),
        ([1], ValueError, "keep gives 1 numbers for 2 stages"),
        (4, ValueError, "keep must be from 0 to 3, the number of micro-batches, got 4"),
        ([0, -1], ValueError, r"keep must be from 0 to 3, .* got \[0, -1\]"),
    ],
)
def test_bad_keep_is_refused(keep, error, match):
    with pytest.raises(error, match=match):
        with_recompute(gpipe(2, 3), keep)


def test_recompute_once():
    with pytest.raises(ValueError, match="schedule 'gpipe' recomputes already"):
        with_recompute(with_recompute(gpipe(2, 3), 1), 1)
