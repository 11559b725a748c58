"""``DistributedGPipe(two_pass=True)``: the bits of ``GPipe``, one process a stage."""

import pytest
import torch
from nets import assert_same, gradients, make_pipe
from test_buffers import Counter
from test_distributed import cross_entropy, joined, mean_square, wrapped
from test_exact import data, net
from test_two_pass import with_everything
from torch import nn
from worlds import World

from gpipe import is_recomputing, schedules
from gpipe.distributed import DistributedGPipe
from gpipe.models.contrastive import ContrastiveLoss


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


def steps(pipe, call):
    """Three mini-batches, the last of other sizes; the inputs' gradients and the losses."""
    found = {}
    for i, n in enumerate((11, 11, 3)):
        x, y = data(n)
        x = x.clone().requires_grad_()
        found[f"loss {i}"] = call(x, y)
        found[f"x {i}"] = x.grad
    return found | gradients(pipe)


def train(rank, balance, options):
    pipe = wrapped(net(0.1), balance, two_pass=True, **options)
    found = steps(pipe, pipe.train_step)
    spans = [str(span.action) for span in pipe.timeline.workers[0]]
    return found, spans


@pytest.mark.parametrize("keep", ["always", "except_last", "never"])
@pytest.mark.parametrize(
    ("schedule", "balance"),
    [
        (None, [4, 2]),
        ("gpipe_zero_bubble", [4, 2]),
        ("zero_bubble_h1", [4, 2]),
        ("interleaved_one_f_one_b", [1, 2, 1, 2]),
        (schedules.one_f_one_b, None),
    ],
)
def test_gradients_are_those_of_one_pass_on_threads(two, schedule, balance, keep):
    first, last = two.values(train, balance, {"schedule": schedule, "checkpoint": keep})
    module = net(0.1)
    pipe = make_pipe(module, [6], 4)
    expected = steps(module, lambda x, y: pipe.train_step(x, y, cross_entropy))
    found = first[0] | {name: value for name, value in last[0].items() if not name.startswith("x ")}
    assert_same(found, expected)
    for i in range(3):
        assert torch.equal(first[0][f"loss {i}"], last[0][f"loss {i}"])
        assert last[0][f"x {i}"] is None
    for _, spans in (first, last):
        assert [a[1] for a in spans[:3]] == ["F"] * 3
        assert "R" in "".join(spans)


def contrast(rank, keep):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), Counter("in place"), nn.BatchNorm1d(4), nn.Linear(4, 6), Towers())
    pipe = wrapped(module, [2, 3], 3, ContrastiveLoss(), two_pass=True, checkpoint=keep)
    x = torch.linspace(-1, 1, 44).reshape(11, 4)
    for _ in range(2):
        pipe.train_step(x, ())
    return gradients(pipe) | dict(pipe.state_dict())


class Towers(nn.Module):
    """Gives the features of two towers."""

    def forward(self, x):
        return x[:, :3], x[:, 3:]


@pytest.mark.parametrize("keep", ["always", "never"])
def test_a_contrastive_loss_and_buffers(two, keep):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), Counter("in place"), nn.BatchNorm1d(4), nn.Linear(4, 6), Towers())
    loss_fn, pipe = ContrastiveLoss(), make_pipe(module, [2, 3], 3, keep)
    x = torch.linspace(-1, 1, 44).reshape(11, 4)
    for _ in range(2):
        pipe.train_step(x, (), loss_fn)
    expected = gradients(module) | module.state_dict() | {"loss_fn.logit_scale": loss_fn.logit_scale.grad}
    assert_same(joined(two.values(contrast, keep)), expected)
    assert expected["1.calls"] == 6


class Everything(nn.Module):
    def forward(self, x):
        return with_everything(x)


def of_everything(tree, target):
    return ((tree["y"] * tree["positive"] + tree["apart"] - target) ** 2).mean()


def pass_trees(rank, frozen):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Everything()).requires_grad_(not frozen)
    pipe = wrapped(module, [1, 2], 3, Scaled(), two_pass=True)
    pipe.train_step(torch.ones(7, 4), torch.zeros(7, 4))
    return gradients(pipe)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, output, target):
        return of_everything(output, target) * self.scale


@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_of_every_kind(two, frozen):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Everything()).requires_grad_(not frozen)
    loss_fn = Scaled()
    make_pipe(module, [1, 2]).train_step(torch.ones(7, 4), torch.zeros(7, 4), loss_fn)
    expected = gradients(module) | {"loss_fn.scale": loss_fn.scale.grad}
    assert_same(joined(two.values(pass_trees, frozen)), expected)


class Fails(nn.Module):
    def __init__(self, again):
        super().__init__()
        self.again = again

    def forward(self, x):
        if is_recomputing() == self.again:
            raise ValueError("boom")
        return x


def fail(rank, again):
    pipe = wrapped(nn.Sequential(nn.Linear(4, 4), Fails(again)), [1, 1], 6, mean_square, two_pass=True)
    pipe.train_step(torch.ones(6, 4), torch.ones(6, 4))


@pytest.mark.parametrize(
    ("again", "action"), [(False, "micro-batch 0, action 1F0"), (True, "micro-batch 5, action 1R5")]
)
def test_a_failure_in_either_pass_ends_both_ranks(two, again, action):
    first, last = two.run(fail, again)
    assert (first.type, last.type, last.message) == ("OtherRankFailed", "ValueError", "boom")
    assert f"cell 1 (Fails), {action}" in last.notes[0]
    assert "boom" in first.message
    assert action in first.message


def make(rank, options):
    DistributedGPipe(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), chunks=2, loss_fn=of_everything, **options[rank])


def test_bad_input_is_refused_on_every_rank(two):
    message = "two_pass=True is for a loss over the whole mini-batch"
    for raised in two.run(make, [{"two_pass": True, "loss_over": "micro_batch"}] * 2):
        assert raised.type == "ValueError"
        assert message in raised.message
    for raised in two.run(make, [{"two_pass": True}, {"two_pass": False}]):
        assert "they differ in " in raised.message
        assert "two_pass: rank 0 has True, rank 1 has False" in raised.message
