import pytest

from gpipe import Action, Kind, Schedule, ScheduleError, schedules
from gpipe.schedules import with_recompute


def parse(text):
    return tuple(Action(int(word[0]), Kind(word[1]), int(word[2:])) for word in text.split())


def schedule(*workers, stages=2, micro_batches=2):
    return Schedule("mine", stages, micro_batches, tuple(map(parse, workers)))


def test_action_prints_in_torchs_notation():
    assert str(Action(2, Kind.FORWARD, 0)) == "2F0"


def test_gpipe_is_this_picture():
    assert schedules.gpipe(3, 4).validate().render() == (
        "worker 0: 0F0 0F1 0F2 0F3                 0B3 0B2 0B1 0B0\n"
        "worker 1:     1F0 1F1 1F2 1F3         1B3 1B2 1B1 1B0\n"
        "worker 2:         2F0 2F1 2F2 2F3 2B3 2B2 2B1 2B0"
    )


def test_recompute_stands_ahead_of_the_wait_for_the_gradient():
    assert with_recompute(schedules.gpipe(2, 3), [1, 0]).validate().render() == (
        "worker 0: 0F0 0F1 0F2             0B2 0R1 0B1 0R0 0B0\nworker 1:     1F0 1F1 1F2 1R2 1B2 1R1 1B1 1R0 1B0"
    )


@pytest.mark.parametrize(("keep", "recomputed"), [(0, {0, 1, 2}), (1, {0, 1}), (2, {0}), (3, set())])
def test_keep_counts_the_last_micro_batches(keep, recomputed):
    passed = with_recompute(schedules.gpipe(2, 3), [keep, keep])
    assert {m for stage, m in passed.recomputed if stage == 1} == recomputed
    assert passed.validate() is passed


def test_halves_split_at_the_loss():
    forward, backward = with_recompute(schedules.gpipe(2, 2), [0, 1]).halves
    assert forward == (parse("0F0 0F1"), parse("1F0 1F1"))
    assert backward == (parse("0R1 0B1 0R0 0B0"), parse("1B1 1R0 1B0"))


def test_a_schedule_that_interleaves_has_no_halves():
    one_f_one_b = schedule("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1").validate()
    with pytest.raises(ScheduleError, match=r"worker 1 runs 1F1 after a backward.*use loss_over='micro_batch'"):
        _ = one_f_one_b.halves


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
@pytest.mark.parametrize("keep", [0, 1, 7])
def test_every_builder_and_pass_is_valid(stages, micro_batches, keep):
    with_recompute(schedules.gpipe(stages, micro_batches), [min(keep, micro_batches)] * stages).validate()


def test_deadlock_is_shown_with_its_place():
    crossed = schedule("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    with pytest.raises(ScheduleError) as caught:
        crossed.validate()
    assert str(caught.value) == (
        "schedule 'mine' never ends: worker 0 at 0B0 waits for 0F0, 1B0; worker 1 at 1F1 waits for 0F1. "
        "Reorder these actions.\n"
        "worker 0: 0F0    0B0<--\n".replace("    ", "    ")
        + "worker 1:        1F0    1F1<--"
    )


@pytest.mark.parametrize(
    ("workers", "problem"),
    [
        (("0F0 0F1 0B1 0B0", "1F0 1F1 1B1"), "1B0 is missing"),
        (("0F0 0F1 0F1 0B1 0B0", "1F0 1F1 1B1 1B0"), "0F1 stands 2 times"),
        (("0B0 0F0 0F1 0B1", "1F0 1F1 1B1 1B0"), "worker 0 at 0B0 waits for 0F0, 1B0"),
        (("0F0 0F1 0B1 0B0 1F0", "1F1 1B1 1B0"), r"1F1 is given to worker 1, but worker 0\s+hosts stage 1"),
        (("0F0 0F1 0B1 0B0 2F0", "1F0 1F1 1B1 1B0"), "2F0 of worker 0 is outside 2 stages and 2 micro-batches"),
        (("0F0 0F1 0B1 0R1 0B0", "1F0 1F1 1B1 1B0"), "worker 0 at 0B1 waits for"),
    ],
)
def test_what_cannot_run_is_refused(workers, problem):
    with pytest.raises(ScheduleError, match=problem):
        schedule(*workers).validate()


def test_many_stages_are_quick_to_validate():
    big = with_recompute(schedules.gpipe(128, 256), [1] * 128).validate()
    assert len(big.recomputed) == 128 * 255
