"""Gradients that wait at a stage slower than the next one find room."""

from dataclasses import replace

import pytest
import torch
from nets import Apply
from torch import nn

import gpipe.balancing
from gpipe import GPipe, record
from gpipe.partitioning.cost import CellCost, SkipCost
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import Infeasible, predict, solve
from gpipe.queueing import solve_with_queues, waiting_bytes


def slow_first(boundary=100, input_bytes=0):
    """A stage that takes four times as long as the next one, with a large output and a small input."""
    return [CellCost("slow", 4.0, 8.0, 10, boundary, 0), CellCost("fast", 1.0, 2.0, 10, 1, 0)]


def test_even_stages_hold_one_gradient_at_a_time():
    cells = [CellCost(f"c{i}", 1.0, 2.0, 10, 100, 0) for i in range(4)]
    assert waiting_bytes(predict(cells, [1, 1, 1, 1], micro_batches=8), cells, 0) == [0, 0, 0, 0]


def test_they_queue_at_a_slow_stage():
    cells = slow_first()
    # recompute and backward take 12 and 3: when the third slow one ends all 8 are there, two gone, one accounted for
    partition = predict(cells, [1, 1], micro_batches=8, keep=0)
    assert waiting_bytes(partition, cells, 0) == [5 * 100, 0]
    # 8 and 2: when the second slow one ends all are there; the first has freed its activations
    assert waiting_bytes(predict(cells, [1, 1], micro_batches=8), cells, 0)[0] == 6 * 100 - 10


def test_gradients_of_skips_queue_until_the_chain_has_come_back():
    cells = [CellCost(f"c{i}", 1.0, 2.0, 10, 0, 0) for i in range(4)]
    cells[0] = replace(cells[0], skips=(SkipCost(2, 100, 0),))
    # even stages: when the first has gone backward once, the third has done so twice more, the last time just now
    assert waiting_bytes(predict(cells, [1, 1, 1, 1], micro_batches=8), cells, 0) == [100, 0, 0, 0]
    slow = [
        replace(cell, forward_seconds=1.0, backward_seconds=9.0) if i == 1 else cell for i, cell in enumerate(cells)
    ]
    # the second stage takes 9 seconds, the third 2: all are there before the second backward ends, one micro-batch gone
    assert waiting_bytes(predict(slow, [1, 1, 1, 1], micro_batches=8), slow, 0)[0] == 600 - 10
    # a value that came from elsewhere goes when its micro-batch has gone backward
    third = [cells[0], cells[1], replace(cells[2], forward_seconds=4.0, backward_seconds=8.0, boundary_bytes=100)]
    alone = predict([*third, cells[3]], [1, 1, 1, 1], micro_batches=8, keep=0)
    assert waiting_bytes(alone, [*third, cells[3]], 0)[2] == 400  # of 500


def test_a_limit_leaves_room_for_them():
    cells = slow_first()
    bare = solve(cells, 2, micro_batches=8, memory_limit=[800, None])
    assert bare.keep[0] == 8
    found = solve_with_queues(cells, 2, micro_batches=8, memory_limit=[800, 10**6], keep=None, input_bytes=0)
    assert found.stages[0].bytes <= 800
    assert found.stages[0].memory_limit == 800
    assert found.stages[0].input_bytes > bare.stages[0].input_bytes
    tight = solve_with_queues(cells, 2, micro_batches=8, memory_limit=[660, 10**6], keep=None, input_bytes=0)
    assert (tight.keep, tight.stages[0].bytes) == ((7, 8), 660)
    least = solve_with_queues(cells, 2, micro_batches=8, memory_limit=[520, 10**6], keep=None, input_bytes=0)
    assert (least.keep, least.stages[0].bytes) == ((0, 0), 510)
    assert solve_with_queues(cells, 2, micro_batches=8, memory_limit=None, keep=None, input_bytes=0).keep == (8, 8)


def test_no_room_says_so():
    with pytest.raises((Infeasible, ValueError), match="memory"):
        solve_with_queues(slow_first(), 2, micro_batches=8, memory_limit=[300, 10**6], keep=[0, 0], input_bytes=0)


def profiled_as_slow_first(*arguments, **options):
    """A profile whose seconds no other process disturbs: by the time the second backward ends, all gradients wait."""
    costs = profile(*arguments, **options)
    return [
        replace(cost, forward_seconds=seconds, backward_seconds=seconds)
        for cost, seconds in zip(costs, (20.0, 1.0), strict=True)
    ]


def test_a_pipe_stays_under_its_limit_though_gradients_queue(monkeypatch):
    monkeypatch.setattr(gpipe.balancing, "profile", profiled_as_slow_first)

    def slow(x, linear):
        for _ in range(20):
            linear(x)
        return linear(x)

    torch.manual_seed(0)
    module = nn.Sequential(Apply(slow, nn.Linear(8, 2000)), nn.Linear(2000, 4))
    x = torch.randn(64, 8)
    limit = 3_000_000
    pipe = GPipe(module, devices=["cpu"] * 2, chunks=8, sample=x, memory_limit=limit, checkpoint="auto")
    with record(pipe, memory=True) as timeline:
        pipe(x).square().mean().backward()
    state = 2 * pipe._stages[0].parameter_bytes
    assert timeline.peak_bytes[0] + state <= limit
