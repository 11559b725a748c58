"""Costs of stages: from those of cells, and from a recorded mini-batch."""

import threading
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from pacing import in_turn, turns
from torch import nn

from gpipe import GPipe, StageCost, Timeline, record, schedules, simulate
from gpipe.costs import SkipIn, divided_costs, measured_costs
from gpipe.models.unet import unet
from gpipe.partitioning.cost import CellCost, SkipCost
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import predict
from gpipe.schedule import Action, Kind
from gpipe.timeline import Span

CELLS = [
    CellCost("a", 1.0, 4.0, 10, 3, 7, workspace_bytes=50, handed_on_bytes=3),
    CellCost("b", 2.0, 6.0, 20, 4, 9, workspace_bytes=5, handed_on_bytes=4),
    CellCost("c", 4.0, 8.0, 40, 5, 1),
]


def test_a_stage_costs_what_its_cells_cost():
    assert divided_costs(CELLS, [2, 1], weight_share=0.25) == [
        # the output that only c wants is not b's to keep; while a runs, 60 bytes are held, 34 beyond 26
        StageCost(3.0, 7.5, 2.5, 26, 4, 16, workspace_bytes=34),
        StageCost(4.0, 6.0, 2.0, 40, 5, 1),
    ]


def test_a_recorded_mini_batch_gives_medians():
    def spans(stage, kinds):
        return [Span(Action(stage, kind, m), 10.0 * m, 10.0 * m + s) for kind, s, m in kinds]

    F, R, B = Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD
    I, W = Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT  # noqa: E741
    whole = spans(0, [(F, 1, 0), (F, 3, 1), (R, 2, 0), (B, 4, 0), (B, 6, 1)])
    split = spans(1, [(F, 1, 0), (I, 2, 0), (W, 3, 0)])
    assert measured_costs(Timeline((tuple(whole), tuple(split)))) == [StageCost(2, 5, 0), StageCost(1, 2, 3)]


SKIPPING = [
    CellCost("a", 1.0, 2.0, 10, 3, 0, skips=(SkipCost(2, 100, 30, 20, 110, 150), SkipCost(3, 7))),
    *(CellCost(name, 1.0, 2.0, 10, 3, 0) for name in "bcd"),
]


def test_what_stages_hand_each_other_beside_the_chain():
    def skips(*balance):
        return [(c.activation_bytes, c.workspace_bytes, c.skips) for c in divided_costs(SKIPPING, balance)]

    # both ends in a stage: what c alone keeps is an activation; what holds the gradient waits while b runs
    assert skips(4) == [(40 + 20, (20 + 150 + 7) - 40, ())]
    assert StageCost.of_cells(SKIPPING[:3]).activation_bytes == 30 + 20
    # a's gradients come from elsewhere and are counted while they are there
    assert skips(2, 2) == [(20, 0, ()), (20, 0, (SkipIn(0, 107, 37, 117),))]
    assert skips(1, 3) == [(10, 0, ()), (30, (10 + 150 + 7) - 30, (SkipIn(0, 107, 37, 117),))]
    assert skips(1, 1, 1, 1)[1:] == [(10, 0, ()), (10, 0, (SkipIn(0, 100, 30, 110),)), (10, 0, (SkipIn(0, 7, 7, 7),))]


@pytest.mark.parametrize(
    ("balance", "problem"), [([1, 1], "must sum to the number of cells, 3"), ([3, 0], "balance"), ([], "sum to")]
)
def test_predict_refuses_what_is_no_balance(balance, problem):
    with pytest.raises(ValueError, match=problem):
        predict(CELLS, balance, micro_batches=2)


def transformer():
    layers = [nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True) for _ in range(4)]
    return nn.Sequential(*layers), [2, 2], torch.randn(32, 32, 64)


def skipping():
    return unet(depth=3, num_convs=2, base_channels=8), [10, 11], torch.randn(16, 3, 32, 32)


@cache
def profiled(net):
    module, balance, x = net()
    return divided_costs(profile(module, x, chunks=8, repeats=1), balance)


@pytest.mark.parametrize("seconds", [[(1.0, 2.0), (1.0, 2.0)], [(3.0, 6.0), (1.0, 2.0)], [(1.0, 2.0), (3.0, 6.0)]])
@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize(("net", "keep"), [*product([transformer], [0, 2, 8]), *product([skipping], [0, 1, 4, 8])])
def test_simulated_bytes_are_those_counted(net, name, keep, seconds):
    torch.manual_seed(0)
    module, balance, x = net()
    costs = [
        replace(cost, forward_seconds=forward, input_gradient_seconds=backward, weight_gradient_seconds=0.0)
        for cost, (forward, backward) in zip(profiled(net), seconds, strict=True)
    ]
    schedule = schedules.with_recompute(schedules.builder(name)(stages=2, micro_batches=8), keep)
    predicted = simulate(schedule, costs, input_bytes=x.nbytes // 8, static_bytes_per_param=2.0)
    pipe = GPipe(module, balance, devices=["cpu"] * 2, chunks=8)
    with in_turn(turns(schedule, seconds, halves=False)), record(pipe, memory=True) as counted:
        pipe.train_step(x, x[:, :1], lambda y, target: (y - target).square().mean(), "micro_batch", schedule=schedule)
    assert predicted.peak_bytes == pytest.approx(counted.peak_bytes, rel=0.06)


def test_company_leaves_when_the_profile_is_taken():
    before = threading.active_count()
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    alone, beside = (profile(module, torch.randn(6, 8), repeats=2, company=n) for n in (0, 2))
    assert threading.active_count() == before
    assert [c.activation_bytes for c in alone] == [c.activation_bytes for c in beside]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        profile(nn.Sequential(nn.Linear(8, 8), nn.Linear(3, 2)), torch.randn(6, 8), company=2)
    assert threading.active_count() == before
