"""Every schedule through the worker loop: exact, the same for every number of stages, and no larger than predicted."""

import re
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import assert_same, compositions, gradients, linears, make_pipe
from torch import nn

from gpipe import GPipe, Schedule, ScheduleError, record, schedules
from gpipe.schedule import Action, Kind

NAMES = [name for name in schedules.BUILDERS if name != "interleaved_one_f_one_b"]
every_schedule = pytest.mark.parametrize("schedule", NAMES)
mse = nn.functional.mse_loss


def whole_numbers():
    """A net whose sums are exact in any order: small whole numbers."""
    module = linears(4).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randint(-2, 3, p.shape))
    return module


def summed(output, target):
    return ((output - target) ** 2).sum() / len(target)


@pytest.mark.parametrize("keep", [0, 1, 3, 99])
@every_schedule
def test_gradients_are_exact(schedule, keep):
    torch.manual_seed(0)
    x, y = torch.randint(-3, 4, (2, 8, 4)).double()
    module = whole_numbers()
    summed(module(x), y).backward()
    expected = gradients(module)
    for balance in compositions(4):
        module.zero_grad()
        pipe = make_pipe(module, balance, chunks=4, checkpoint=keep)
        loss = pipe.train_step(x, y, summed, "micro_batch", schedule=schedule)
        assert_same(gradients(module), expected, f"{schedule}, {balance}")
        assert loss == summed(module(x), y)


def layers(dropout=0.1):
    torch.manual_seed(0)
    layer = [nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True) for _ in range(3)]
    return nn.Sequential(nn.Linear(4, 8), *layer)


@every_schedule
def test_weights_are_the_same_to_the_bit_for_every_number_of_stages_and_every_keep(schedule):
    torch.manual_seed(1)
    x, y = torch.randn(7, 5, 4), torch.randn(7, 5, 8)
    expected = None
    for balance in ([4], [1, 3], [2, 2], [1, 1, 1, 1]):
        for keep in (0, 2, 99):
            module = layers()
            pipe = make_pipe(module, balance, chunks=5, checkpoint=keep)
            optimizer = torch.optim.SGD(module.parameters(), 0.1)
            for _ in range(2):
                optimizer.zero_grad()
                pipe.train_step(x, y, mse, "micro_batch", schedule=schedule)
                optimizer.step()
            state = module.state_dict()
            expected = expected or state
            assert_same(state, expected, f"{balance}, keep {keep}")


@pytest.mark.parametrize("keep", [0, 2, 99])
def test_a_loss_over_the_mini_batch_admits_flushes(keep):
    x, y = torch.randn(7, 5, 4), torch.randn(7, 5, 8)
    found = []
    for schedule in ("gpipe", "gpipe_zero_bubble"):
        module = layers()
        make_pipe(module, [2, 2], chunks=4, checkpoint=keep).train_step(x, y, mse, schedule=schedule)
        found.append(gradients(module))
    assert_same(found[1], found[0])


def test_autocast_reaches_both_parts_of_a_backward():
    x, y = torch.randn(6, 5, 4), torch.randn(6, 5, 8)
    found = []
    for schedule in ("gpipe", "gpipe_zero_bubble"):
        module = layers()
        with torch.autocast("cpu", torch.bfloat16):
            make_pipe(module, [2, 2], chunks=3).train_step(x, y, mse, schedule=schedule)
        found.append(gradients(module))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("schedule", ["one_f_one_b", "zero_bubble_h1"])
def test_a_loss_over_the_mini_batch_refuses_the_others(schedule):
    pipe = make_pipe(linears(), chunks=5)
    x = torch.ones(8, 4)
    with pytest.raises(ScheduleError, match=f"{schedule}.* interleaves forward and backward.*loss_over='micro_batch'"):
        pipe.train_step(x, x, mse, schedule=schedule)
    pipe.train_step(x, x, mse, "micro_batch", schedule=schedule)


def test_several_stages_on_a_worker():
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    for keep in (0, 1, 99):
        found = []
        for schedule in ("one_f_one_b", "interleaved_one_f_one_b"):
            torch.manual_seed(0)
            module = linears(4)
            pipe = make_pipe(module, chunks=4, checkpoint=keep)
            pipe.train_step(x, y, mse, "micro_batch", schedule=schedule)
            found.append(gradients(module))
        assert len(pipe.timeline.workers) == 2
        assert_same(found[1], found[0], f"keep {keep}")


def test_a_builder_and_a_ready_schedule():
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    found = []
    ready = schedules.with_recompute(schedules.gpipe(stages=3, micro_batches=4), [0, 4, 1])
    for schedule in ("gpipe", schedules.gpipe, ready, Schedule("mine", 3, 4, ready.workers)):
        torch.manual_seed(0)
        module = linears()
        pipe = make_pipe(module, chunks=4, checkpoint="never")
        pipe.train_step(x, y, mse, "micro_batch", schedule=schedule)
        found.append(gradients(module))
    for other in found[1:]:
        assert_same(other, found[0])
    assert [str(a) for a, *_ in pipe.timeline.workers[2]] == [str(a) for a in ready.workers[2]]


class Builder:
    """A builder without a hash."""

    __hash__ = None

    def __init__(self, build):
        self.build = build

    def __call__(self, *, stages, micro_batches):
        return self.build(micro_batches)


def test_a_builder_without_a_hash():
    pipe = make_pipe(linears(), chunks=4)
    pipe.train_step(
        torch.ones(8, 4), torch.ones(8, 4), mse, schedule=Builder(lambda m: schedules.gpipe(stages=3, micro_batches=m))
    )


@pytest.mark.parametrize(
    ("schedule", "error", "problem"),
    [
        ("gpip", ValueError, "schedule must be one of 'gpipe', 'gpipe_zero_bubble'.*got 'gpip'"),
        (3, TypeError, "schedule must be one of.*a builder or a Schedule, got int 3"),
        (
            schedules.gpipe(stages=2, micro_batches=4),
            ValueError,
            "is for 2 stages and 4 micro-batches, but",
        ),
        (schedules.gpipe(stages=3, micro_batches=5), ValueError, "and 5 micro-batches, but there are 3 and 4"),
        (
            Schedule("odd", 3, 4, schedules.gpipe(stages=2, micro_batches=4).workers),
            ScheduleError,
            "2F0 is missing",
        ),
        (Builder(lambda m: schedules.gpipe(stages=3, micro_batches=m + 1)), ValueError, "and 5 micro-batches, but"),
        (Builder(lambda m: schedules.gpipe(stages=3, micro_batches=m - 1)), ValueError, "and 3 micro-batches, but"),
        (Builder(lambda m: None), TypeError, "a schedule's builder must return a Schedule, got NoneType"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(schedule, error, problem):
    ran = []
    module = linears()
    module[0].register_forward_hook(lambda *_: ran.append(1))
    pipe = make_pipe(module, chunks=4)
    for loss_over in ("mini_batch", "micro_batch"):
        with pytest.raises(error, match=problem):
            pipe.train_step(torch.ones(8, 4), torch.ones(8, 4), mse, loss_over, schedule=schedule)
    assert not ran
    pipe(torch.ones(8, 4)).sum().backward()


def test_what_fails_in_a_part_of_a_backward_is_located():
    class Bomb(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("boom")

    class Cell(nn.Module):
        def forward(self, x):
            return Bomb.apply(x)

    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), Cell(), nn.Linear(4, 4)), chunks=2)
    with pytest.raises(ArithmeticError, match="boom") as caught:
        pipe.train_step(torch.ones(4, 4), torch.ones(4, 4), mse, "micro_batch", schedule="zero_bubble_h1")
    assert re.search(r"raised in stage 1 .*action 1I0", caught.value.__notes__[0])


# --- random schedules -------------------------------------------------------------------------------------------------


@st.composite
def legal(draw):
    """A schedule made by performing any action that may come next, until none is left."""
    stages, micro_batches = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    pairs = [(k, m) for k in range(stages) for m in range(micro_batches)]
    split = {pair: draw(st.booleans()) for pair in pairs}
    dropped = {pair: draw(st.booleans()) for pair in pairs}
    needs = {}
    for k, m in pairs:
        back = lambda k, m: Action(k, Kind.INPUT_GRADIENT if split[k, m] else Kind.BACKWARD, m)  # noqa: E731
        forward = Action(k, Kind.FORWARD, m)
        needs[forward] = [Action(k - 1, Kind.FORWARD, m)] if k else []
        needs[back(k, m)] = [forward, *([back(k + 1, m)] if k + 1 < stages else [])]
        if dropped[k, m]:
            recompute = Action(k, Kind.RECOMPUTE, m)
            needs[recompute] = [forward]
            needs[back(k, m)].append(recompute)
        if split[k, m]:
            needs[Action(k, Kind.WEIGHT_GRADIENT, m)] = [back(k, m)]
    workers = [[] for _ in range(stages)]
    done = set()
    while len(done) < len(needs):
        ready = sorted(a for a in needs if a not in done and all(n in done for n in needs[a]))
        action = draw(st.sampled_from(ready))
        workers[action.stage].append(action)
        done.add(action)
    return Schedule("random", stages, micro_batches, tuple(map(tuple, workers)))


@settings(max_examples=40, deadline=None)
@given(legal())
def test_any_legal_schedule_runs_and_is_exact(schedule):
    torch.manual_seed(0)
    x, y = torch.randint(-3, 4, (2, 2 * schedule.micro_batches, 4)).double()
    module = whole_numbers()[: schedule.stages]
    summed(module(x), y).backward()
    expected = gradients(module)
    module.zero_grad()
    pipe = make_pipe(module, chunks=schedule.micro_batches)
    pipe.train_step(x, y, summed, "micro_batch", schedule=schedule)
    assert_same(gradients(module), expected)
    assert [[s.action for s in spans] for spans in pipe.timeline.workers] == [list(w) for w in schedule.workers]


@settings(max_examples=40, deadline=None)
@given(legal(), st.data())
def test_what_is_no_longer_legal_is_refused_before_it_runs(schedule, data):
    workers = [list(w) for w in schedule.workers]
    worker = data.draw(st.sampled_from(workers))
    at = data.draw(st.integers(0, len(worker) - 1))
    change = data.draw(st.sampled_from(["drop", "double", "first"]))
    if change == "drop" and worker[at].kind != Kind.RECOMPUTE:
        del worker[at]
    elif change == "double":
        worker.insert(at, worker[at])
    else:
        backward = next(i for i, a in enumerate(worker) if a.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT))
        worker.insert(0, worker.pop(backward))
    ran = []
    module = linears(schedule.stages)
    module[0].register_forward_hook(lambda *_: ran.append(1))
    pipe = make_pipe(module, chunks=schedule.micro_batches)
    x = torch.ones(2 * schedule.micro_batches, 4)
    broken = Schedule("broken", schedule.stages, schedule.micro_batches, tuple(map(tuple, workers)))
    with pytest.raises(ScheduleError):
        pipe.train_step(x, x, mse, "micro_batch", schedule=broken)
    assert not ran


# --- what is recorded -------------------------------------------------------------------------------------------------


def test_record_holds_the_last_mini_batch():
    pipe = GPipe(linears(), [1, 2], devices=["cpu"] * 2, chunks=3, checkpoint="never")
    x = torch.ones(6, 4)
    with record(pipe) as timeline:
        assert timeline.workers == ()
        assert timeline.makespan == 0
        pipe.train_step(x, x, mse)
        pipe.train_step(x, x, mse, "micro_batch", schedule="zero_bubble_h1")
    assert [str(s.action) for s in timeline.workers[1]] == "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2".split()
    assert timeline.makespan > 0
    assert timeline.peak_bytes == ()
    before = timeline.makespan
    pipe(x)
    assert timeline.makespan == before


def test_record_of_nothing_is_empty():
    pipe = GPipe(linears(), [1, 2], devices=["cpu"] * 2)
    pipe(torch.ones(6, 4))
    with record(pipe) as timeline:
        pass
    assert timeline.workers == ()


def test_record_survives_an_error():
    pipe = GPipe(linears(), [1, 2], devices=["cpu"] * 2)
    with suppress(KeyError), record(pipe, memory=True) as timeline:
        pipe(torch.ones(6, 4))
        raise KeyError
    assert len(timeline.peak_bytes) == 2
    pipe(torch.ones(6, 4))
    assert pipe.timeline.peak_bytes == ()


def test_bytes_are_recorded_over_time():
    pipe = GPipe(linears(4, width=64), [2, 2], devices=["cpu"] * 2, chunks=4, checkpoint="never")
    x = torch.randn(16, 64)
    with record(pipe, memory=True) as timeline:
        pipe.train_step(x, x, mse)
    parameters = 2 * (64 * 64 + 64) * 4
    for stage in timeline.memory:
        assert stage.bytes[0] == parameters
        assert stage.peak > 2 * parameters  # gradients too
        assert all(a <= b for a, b in zip(stage.times, stage.times[1:], strict=False))
