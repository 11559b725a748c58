"""Timelines of simulated accelerators, which are known to take so long for what a cell does."""

from statistics import median

import pytest
import torch
from torch import nn
from worlds import World

import gpipe
from gpipe import schedules
from gpipe.simulate import StageCost, simulate
from gpipe.testing import accelerators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators: --accelerators"),
]

FORWARD, BACKWARD = 0.03, 0.05  # seconds


class Taking(torch.autograd.Function):
    """Nothing, which keeps the device busy."""

    @staticmethod
    def forward(ctx, x):
        return accelerators.spend(x, FORWARD)

    @staticmethod
    def backward(ctx, gradient):
        return accelerators.spend(gradient, BACKWARD)


class Slow(nn.Linear):
    """A cell whose device is busy for a while."""

    def forward(self, x):
        return Taking.apply(super().forward(x))


def mean_square(y, target):
    return (y - target).square().mean()


def assert_takes(spans):
    """Every action as long as the device is busy, and as it waits within for what a loaded machine launches late."""
    seconds = {gpipe.Kind.FORWARD: FORWARD, gpipe.Kind.RECOMPUTE: FORWARD, gpipe.Kind.BACKWARD: BACKWARD}
    late = [end - start - seconds[action.kind] for action, start, end in spans]
    assert min(late) > -1e-4
    assert median(late) < 0.01


# What was recorded was the launching, some microseconds an action: every stage seemed idle all the time.
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize("checkpoint", ["never", "always"])
def test_a_run_takes_as_long_as_simulated(schedule, checkpoint):
    stages, chunks = 3, 4
    devices = [f"sim:{k}" for k in range(stages)]
    pipe = gpipe.GPipe(
        nn.Sequential(*(Slow(4, 4) for _ in devices)), [1] * 3, devices=devices, chunks=chunks, checkpoint=checkpoint
    )
    x = torch.ones(8, 4)
    plan = schedules.BUILDERS[schedule](stages, chunks)
    expected = simulate(
        plan if checkpoint == "never" else schedules.with_recompute(plan, 0), StageCost(FORWARD, BACKWARD, 0.0)
    )
    for _ in range(2):
        with gpipe.record(pipe) as timeline:
            pipe.train_step(x, x, mean_square, "micro_batch", schedule=schedule)
    for spans in timeline.workers:
        assert_takes(spans)
    assert 0.99 * expected.makespan < timeline.makespan < 1.4 * expected.makespan
    assert timeline.bubble == pytest.approx(expected.bubble, abs=0.15)


def test_nothing_waits_until_the_timeline_is_asked_for():
    pipe = gpipe.GPipe(nn.Sequential(Slow(4, 4), Slow(4, 4)), [1, 1], devices=["sim:0", "sim:1"], chunks=2)
    x = torch.ones(8, 4, device="sim:0")
    target = torch.ones(8, 4, device="sim:1")
    pipe.train_step(x, target, mean_square, "micro_batch")
    accelerators.clear()
    pipe.train_step(x, target, mean_square, "micro_batch")
    assert accelerators.counts()["host_waits"] == 0
    whole = pipe.timeline
    assert accelerators.counts()["host_waits"] > 0
    accelerators.clear()
    assert pipe.timeline == whole
    assert accelerators.counts()["host_waits"] == 0


def recorded_on_a_rank(rank, device):
    pipe = gpipe.DistributedGPipe(
        nn.Sequential(Slow(4, 4), Slow(4, 4)), [1, 1], chunks=3, device=device, loss_fn=mean_square, checkpoint="never"
    )
    x = torch.ones(6, 4)
    for _ in range(2):
        with gpipe.record(pipe) as timeline:
            pipe.train_step(x, x)
    return timeline.workers


def test_ranks_record_what_their_devices_did():
    world = World(2)
    try:
        found = world.values(recorded_on_a_rank, "sim:0", seconds=120)
    finally:
        world.close()
    for (spans,) in found:
        assert len(spans) == 6
        assert_takes(spans)


def test_the_cpu_and_an_accelerator_have_one_clock():
    pipe = gpipe.GPipe(nn.Sequential(nn.Linear(4, 4), Slow(4, 4)), [1, 1], devices=["cpu", "sim:0"], chunks=2)
    x = torch.ones(8, 4)
    for _ in range(2):
        pipe.train_step(x, x, mean_square, "micro_batch")
    host, device = pipe.timeline.workers
    assert_takes(device)
    for action, _, end in host[:2]:
        assert device[action.micro_batch].start >= end - 1e-3
    assert host[-1].end >= device[-1].end - 1e-3
