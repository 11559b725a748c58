"""Counting the bytes that operators hold, and what a running pipe's stages hold against what was predicted."""

import gc
import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from pacing import in_turn, turns
from torch import nn
from torch.utils._pytree import tree_leaves

from gpipe import GPipe, record, schedules
from gpipe.metering import Meters
from gpipe.models.clip import clip
from gpipe.models.unet import unet
from gpipe.partitioning.live import LiveBytes
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import predict
from gpipe.queueing import waiting_bytes


def test_a_storage_counts_once_and_until_it_is_freed():
    given = torch.ones(100)
    with LiveBytes() as held:
        a = given + 1
        view = a[::2].view(50)
        given.add_(1)
        shared = given[:3]
        assert (held.live, held.peak) == (400, 400)
        b = a * 2
        assert held.live == 800
        del a
        assert held.live == 800  # the view has it
        del view
        assert held.live == 400
    c = b + 1  # outside
    del b
    assert (held.live, held.peak) == (0, 800)
    held.restart()
    assert held.peak == 0
    del c, shared


def test_what_a_graph_holds_counts():
    gc.disable()
    try:
        x = torch.ones(1000, requires_grad=True)
        with LiveBytes() as held:
            y = x.exp().sum()
            assert held.live == 4004
            y.backward()
            del y
        assert held.live == 4000  # the gradient of x
        assert held.peak >= 8000
    finally:
        gc.enable()


def test_a_tensor_counts_for_the_stage_it_is_sent_to():
    meters = Meters({0: 5, 1: 0}, 2)
    with meters.counting(0):
        x = torch.ones(10) + 1
    y = meters.delivered(1, x)
    assert torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()
    assert [max(sizes) for _, sizes in meters.levels()] == [85, y.untyped_storage().nbytes()]


# --- predicted against measured ---------------------------------------------------------------------------------------

MICRO_BATCHES = 8


def convolutions():
    """As in AmoebaNet: ReLU, convolution, batch norm; fewer pixels and more filters from time to time."""
    widths = [3, 16, 16, 32, 32, 48, 48]
    cells = [
        nn.Sequential(
            nn.ReLU() if i else nn.Identity(),
            nn.Conv2d(before, after, 3, 2 if i in (2, 4) else 1, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 1),
        )
        for i, (before, after) in enumerate(itertools.pairwise(widths))
    ]
    return nn.Sequential(*cells, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))), [2, 5]


def transformer():
    layers = [nn.TransformerEncoderLayer(64, 4, 256, dropout=0.1, batch_first=True) for _ in range(6)]
    return nn.Sequential(*layers), [3, 3]


def contrastive():
    return clip(
        image_size=32,
        patch_size=8,
        vision_width=64,
        vision_layers=3,
        vision_heads=2,
        text_width=64,
        text_layers=3,
        text_heads=2,
        embed_dim=32,
        activation="gelu",
        context_length=16,
        vocabulary_size=100,
    ), [4, 6]


def skipping():
    return unet(depth=3, num_convs=2, base_channels=8), [10, 11]


def mini_batch(net):
    if net is skipping:
        return torch.randn(16, 3, 32, 32)
    if net is convolutions:
        return torch.randn(16, 3, 32, 32)
    if net is transformer:
        return torch.randn(16, 32, 64)
    return torch.randn(16, 3, 32, 32), torch.randint(1, 100, (16, 16)), torch.full((16,), 15)


@cache
def profiled(net):
    torch.manual_seed(0)
    return profile(net()[0], mini_batch(net), chunks=MICRO_BATCHES, repeats=1)


def lasting(costs, balance, seconds):
    """``costs`` of cells, whose stages take so many seconds forward and backward."""
    found = iter(costs)
    return [
        replace(cost, forward_seconds=forward / size, backward_seconds=backward / size)
        for size, (forward, backward) in zip(balance, seconds, strict=True)
        for cost in itertools.islice(found, size)
    ]


def step(pipe, optimizer, x):
    optimizer.zero_grad()
    outputs = pipe(x)
    sum(y.square().mean() for y in tree_leaves(outputs)).backward()
    optimizer.step()


def measured_peaks(pipe, x):
    """Bytes each stage holds at its peak in the second step with Adam."""
    optimizer = torch.optim.Adam(pipe.parameters())
    step(pipe, optimizer, x)
    with record(pipe, memory=True) as timeline:
        step(pipe, optimizer, x)
    state = [2 * sum(p.nbytes for cell in stage.cells for p in cell.parameters()) for stage in pipe._stages]
    return [size + peak for size, peak in zip(state, timeline.peak_bytes, strict=True)]


SECONDS = {
    "even": [(1.0, 2.0), (1.0, 2.0)],
    "slow first": [(4.0, 8.0), (1.0, 2.0)],
    "slow last": [(1.0, 2.0), (4.0, 8.0)],
}


@pytest.mark.parametrize("pace", SECONDS)
@pytest.mark.parametrize("keep", [0, 1, 4, 8])
@pytest.mark.parametrize("net", [convolutions, transformer, contrastive, skipping])
def test_predicted_bytes_are_those_measured(net, keep, pace):
    torch.manual_seed(0)
    module, balance = net()
    x = mini_batch(net)
    inputs = sum(t.nbytes for t in tree_leaves(x)) // MICRO_BATCHES
    pipe = GPipe(module, balance, devices=["cpu"] * 2, chunks=MICRO_BATCHES, checkpoint=keep)
    costs = lasting(profiled(net), balance, SECONDS[pace])
    predicted = predict(costs, balance, micro_batches=MICRO_BATCHES, keep=keep, input_bytes=inputs)
    waiting = waiting_bytes(predicted, costs, inputs)
    schedule = schedules.with_recompute(schedules.gpipe(stages=2, micro_batches=MICRO_BATCHES), keep)
    with in_turn(turns(schedule, SECONDS[pace], halves=True)):
        measured = measured_peaks(pipe, x)
    assert [a + b for a, b in zip(predicted.bytes, waiting, strict=True)] == pytest.approx(measured, rel=0.05)
