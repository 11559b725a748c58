"""What the benchmarks compare does the same work: every contender's gradients are those of the plain loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import harness, match, peers
from benchmarks.contenders import Contender
from benchmarks.doors import gradients_of
from benchmarks.flat import flat_cells, unpacked
from benchmarks.harness import Samples
from benchmarks.match import Match
from benchmarks.models import NETS, parts
from benchmarks.peers import uniform
from benchmarks.slices import Slice
from benchmarks.stage_meters import StageMeters
from benchmarks.throughput import bounds
from gpipe.partitioning.cells import cells_of

TINY = NETS["tiny"]
SETTINGS = [
    ("plain", "gpipe", "cells"),
    ("GPipe", "gpipe_zero_bubble", "never"),
    ("GPipe", "gpipe", (1, 1)),
    ("DistributedGPipe", "one_f_one_b", "never"),
    ("torch", "ScheduleGPipe", "never"),
    ("torch", "Schedule1F1B", "cells"),
    ("torch", "Schedule1F1B", "stage"),
    ("torchgpipe", "gpipe", "never"),
    ("fairscale", "gpipe", "except_last"),
]


@pytest.fixture(scope="module")
def gradients():
    found = Match(gradients_of)
    yield found
    found.close()


def squares(gradients, contender):
    answers = gradients.answers(contender)
    assert answers is not None, gradients.failed[contender]
    return sum(square for _, square in answers)


@pytest.mark.slow
@pytest.mark.parametrize("net", [name for name in TINY if name != "ResNet-50"])
def test_every_contender_finds_the_same_gradients(gradients, net):
    count = len(cells_of(TINY[net].made()[0]))
    expected = squares(gradients, Contender("plain", net, 2, "tiny", (count,)))
    missing = peers.missing()
    for door, schedule, recompute in SETTINGS:
        if door not in missing:
            contender = Contender(door, net, 2, "tiny", uniform(count, 2), schedule, recompute)
            assert squares(gradients, contender) == pytest.approx(expected, rel=1e-5), contender


@pytest.mark.rare
def test_a_contender_that_fails_is_named_with_the_reason_and_the_next_one_runs(gradients):
    bad = Contender("torch", "Transformer", 2, "tiny", (2, 2), "NoSuchSchedule")
    good = Contender("torch", "Transformer", 2, "tiny", (2, 2), "ScheduleGPipe")
    assert gradients.able([bad, good]) == [good]
    assert "NoSuchSchedule" in gradients.failed[bad]


@pytest.mark.parametrize("net", TINY)
def test_slices_of_flat_cells_compute_what_the_model_does(net):
    made = TINY[net]
    module, _ = made.made()
    part = parts(made.batch()[0], 2)[0]
    cells, skips = flat_cells(module, part)
    tensors = unpacked(part)
    module.eval()  # no statistics of the batch: the same twice
    cut = len(cells) // 2
    for own in (slice(0, cut), slice(cut, len(cells))):
        stage = Slice(cells, skips, own, "never").eval()
        tensors = unpacked(stage(*tensors))
    for cell in cells:
        cell.cell.eval()
    expected = module(part)
    assert all(map(torch.equal, tensors, unpacked(expected)))


def test_bytes_are_booked_on_the_stage_that_runs():
    stages = [nn.Linear(4, 500), nn.Linear(500, 4)]
    x = torch.randn(8, 4)
    with StageMeters(stages) as meters:
        stages[1](stages[0](x)).sum().backward()
    boundary, rest = 8 * 500 * 4, 8 * 4 * 4
    first, second = (sum(p.nbytes for p in stage.parameters()) for stage in stages)
    # The first: its gradients (the output was copied to the second and is gone). The second: the copy it was given, the
    # gradient it gives, its own gradients and small outputs.
    assert boundary <= meters.meters[0].peak <= first + boundary + 4 * rest
    assert 2 * boundary <= meters.meters[1].peak <= second + 2 * boundary + 8 * rest
    assert meters.meters[0].live == first
    assert meters.meters[1].live >= second


def test_the_bound_of_even_stages_is_the_ceiling_and_the_bubble():
    assert bounds(Samples([2.0], [0.0]), [[2.0, 2.0]], 8).seconds == pytest.approx([2.0 * 9 / 8])
    assert bounds(Samples([2.0], [0.0]), [[2.0, 1.0]], 4).seconds == pytest.approx([2.0 + 1.0 / 4])


def test_a_ratio_is_that_of_rounds_and_leaves_disturbed_ones_out():
    slowing = Samples([1.0, 2.0, 4.0], [0.0] * 3)
    assert harness.ratio(slowing, Samples([2.0, 4.0, 8.0], [0.0] * 3)) == 0.5
    assert harness.ratio(slowing, Samples([2.0, 1.0, 1.0], [0.0, 1.0, 1.0])) == 0.5
    assert harness.ratio(slowing, Samples([1.0, 1.0, 1.0], [1.0] * 3)) == 2.0


def test_the_best_of_a_round_is_chosen_by_the_others():
    steady, lucky = Samples([2.0] * 3, [0.0] * 3), Samples([1.0, 3.0, 3.0], [0.0] * 3)
    assert harness.contest([steady], [lucky]) == 1.5
    once = Samples([1.0, 1.9, 2.2], [0.0] * 3)  # the best by its median, but not without its lucky round
    assert harness.contest([steady], [steady, once]) == 1.0
    assert harness.contest([steady, lucky], [Samples([4.0, 4.0, 4.0], [0.0, 0.0, 1.0])]) == 2.0
    assert harness.contest([Samples([2.0], [0.0])], [Samples([1.0], [1.0])]) == 0.5


def test_torch_gets_our_cut_where_it_is_another(monkeypatch):
    net = TINY["Transformer"]
    monkeypatch.setattr(match, "ours", lambda *_: SimpleNamespace(balance=[1, 3]))
    monkeypatch.setattr(peers, "balance_of", lambda *_: ((1, 3), "somehow"))
    assert not match.Balances(net, 2, 2).has(match.OUR_CUT)
    monkeypatch.setattr(peers, "balance_of", lambda *_: ((2, 2), "somehow"))
    assert match.Balances(net, 2, 2).of(match.OUR_CUT) == (1, 3)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(peers.PACKAGES, "torchgpipe", "no_such_package")
    assert "No module named 'no_such_package'" in match.missing_note(peers.missing())


def test_a_process_that_has_ended_counts_as_it_did_last(monkeypatch):
    monkeypatch.setattr(harness, "_children", {2**22 + 1: 3.0})  # above the largest id there can be
    assert harness._own() >= 3.0
