"""Timelines of accelerators: what their devices did and when, not when it was launched."""

import time

import pytest
import torch
from torch import nn

import gpipe
from gpipe.testing import accelerators

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]


def accelerator(index=0):
    return torch.device(torch.accelerator.current_accelerator().type, index % torch.accelerator.device_count())


class Products(nn.Module):
    """So many products of matrices one after the other, launched at once."""

    def __init__(self, side, count=1):
        super().__init__()
        self.count = count
        self.weight = nn.Parameter(torch.randn(side, side) * side**-0.5)

    def forward(self, x):
        for _ in range(self.count):
            x = x @ self.weight
        return x


def trained(pipe, side):
    x = torch.randn(4 * pipe.chunks, side)
    pipe.train_step(x, x, nn.functional.mse_loss, "micro_batch", schedule="one_f_one_b")


def assert_in_order(timeline, micro_batches):
    """Every worker does one action after the other, and a micro-batch is on one stage after the other."""
    slack = 2e-4  # of bringing the devices to one clock
    for spans in timeline.workers:
        assert len(spans) >= 2 * micro_batches
        assert (spans.end >= spans.start).all()
        assert (spans.start[1:] >= spans.end[:-1] - slack).all()
    for before, after in zip(timeline.workers, timeline.workers[1:], strict=False):
        there = {(a.kind, a.micro_batch): (start, end) for a, start, end in before}
        for action, start, end in after:
            if action.kind == gpipe.Kind.FORWARD:
                assert start >= there[action.kind, action.micro_batch][1] - slack
            if action.kind == gpipe.Kind.BACKWARD:
                assert end <= there[action.kind, action.micro_batch][0] + slack


@pytest.mark.parametrize("devices", [1, 2])
def test_actions_come_one_after_the_other_within_the_step(devices):
    pipe = gpipe.GPipe(
        nn.Sequential(Products(64), Products(64)),
        [1, 1],
        devices=[accelerator(k) for k in range(devices)] * (3 - devices),
        chunks=3,
    )
    trained(pipe, 64)
    for _ in range(3):
        start = time.perf_counter()
        with gpipe.record(pipe) as timeline:
            trained(pipe, 64)
        end = time.perf_counter()
        assert_in_order(timeline, 3)
        assert start - 2e-4 <= timeline.start < timeline.end <= end + 2e-4


def test_a_pipe_over_the_cpu_and_an_accelerator_has_one_clock():
    pipe = gpipe.GPipe(nn.Sequential(Products(64), Products(64)), [1, 1], devices=["cpu", accelerator()], chunks=3)
    trained(pipe, 64)
    trained(pipe, 64)
    assert_in_order(pipe.timeline, 3)


def test_the_timeline_between_forward_and_backward_and_asked_for_twice():
    pipe = gpipe.GPipe(nn.Sequential(Products(64), Products(64)), [1, 1], devices=[accelerator()] * 2, chunks=2)
    y = pipe(torch.randn(8, 64))
    forward = pipe.timeline
    assert [len(spans) for spans in forward.workers] == [2, 2]
    y.sum().backward()
    whole = pipe.timeline
    assert pipe.timeline == whole
    assert all(
        spans[:2] == before for spans, before in zip(map(list, whole.workers), map(list, forward.workers), strict=True)
    )


# What was recorded was the launching: of a device that is behind its launches, the wrong thing.
@pytest.mark.skipif(accelerators.started(), reason="a simulated device takes no time for a product")
def test_an_action_lasts_as_long_as_the_device_needs():
    here = accelerator()
    module = nn.Sequential(Products(2048, 40))
    pipe = gpipe.GPipe(module, [1], devices=[here], chunks=2, checkpoint="never")
    x = torch.randn(4096, 2048, device=here)
    for _ in range(2):
        pipe(x)
    begun, ended = (torch.Event(here, enable_timing=True) for _ in range(2))
    begun.record()
    module(x[:2048])
    ended.record()
    ended.synchronize()
    alone = begun.elapsed_time(ended) / 1e3
    pipe(x)
    (spans,) = pipe.timeline.workers
    for _, start, end in spans:
        assert 0.7 * alone < end - start < 2 * alone
