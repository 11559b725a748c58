"""Schedules as data: the pictures of them, and what is refused."""

import subprocess
import sys

import pytest

from gpipe import Action, Kind, Schedule, ScheduleError
from gpipe.schedules import gpipe, with_recompute


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
        (["0F0", "1F0 1B0"], r"'x': 0B0 is missing\nworker 0: 0F0\nworker 1: 1F0 1B0"),
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


def test_every_gpipe_schedule_is_valid():
    for stages in range(1, 6):
        for micro_batches in range(1, 6):
            for keep in range(micro_batches + 1):
                with_recompute(gpipe(stages, micro_batches), [keep] * stages).validate()


def test_large_schedules_are_validated():
    assert len(with_recompute(gpipe(64, 128), [1] * 64).validate().recomputed) == 64 * 127


def test_schedules_are_frozen_and_comparable():
    assert gpipe(2, 3) == gpipe(2, 3)
    assert hash(gpipe(2, 3)) == hash(gpipe(2, 3))
    with pytest.raises(AttributeError, match="cannot assign to field 'name'"):
        gpipe(2, 3).name = "other"


def test_without_torch():
    program = (
        "import sys, types; sys.modules['gpipe'] = package = types.ModuleType('gpipe'); package.__path__ = ['gpipe']\n"
        "import gpipe.schedules; assert gpipe.schedules.gpipe(2, 2).validate(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
