"""What passes from stage to stage, and what may be written to."""

from collections import namedtuple

import pytest
import torch
from nets import (
    KEEPS,
    Apply,
    PlainLoop,
    assert_as_plain,
    assert_same,
    assert_same_gradients,
    compositions,
    every_keep,
    gradients,
    make_pipe,
    nets,
)
from torch import nn

Pair = namedtuple("Pair", "left right")


def test_boundaries_of_every_kind():
    def start(x, linear):
        h = linear(x)
        return {
            "h": h,
            "index": torch.arange(len(x)),
            "mask": h > 0,
            "nothing": None,
            "number": 3,
            "text": "text",
            "pair": Pair([h * 2, (True, 1.5)], ()),
            "complex": torch.complex(h, h),
            "scalar": torch.tensor(2.0),
            "half": h.bfloat16(),
        }

    def middle(t):
        assert t["nothing"] is None
        assert t["number"] == 3
        assert t["text"] == "text"
        assert isinstance(t["pair"], Pair)
        assert t["pair"].left[1] == (True, 1.5)
        assert t["pair"].right == ()
        assert t["mask"].dtype == torch.bool
        assert not t["index"].requires_grad
        assert t["scalar"].dim() == 0
        h = t["h"] * t["mask"] * t["scalar"] + t["pair"].left[0] + t["complex"].imag + t["half"].float()
        return t | {"h": h + t["index"][:, None]}

    def end(t, linear):
        return linear(t["h"]), t["nothing"], t["number"], t["index"]

    def make():
        return nn.Sequential(Apply(start, nn.Linear(4, 4)), Apply(middle), Apply(end, nn.Linear(4, 4)))

    assert_as_plain(make, torch.randn(7, 4), lambda y: y[0].square().sum())
    output = make_pipe(make())(torch.randn(7, 4))
    assert output[1:3] == (None, 3)
    assert output[3].tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_inputs_of_every_kind():
    def start(t, linear):
        assert t["flag"] is True
        assert t["none"] is None
        return linear(t["x"]) * t["scale"] + t["more"][0][:, None]

    def make():
        return nn.Sequential(Apply(start, nn.Linear(4, 4)), nn.Tanh())

    inputs = {
        "x": torch.randn(7, 4),
        "more": (torch.arange(7), []),
        "flag": True,
        "none": None,
        "scale": torch.tensor(2.0),
    }
    assert_as_plain(make, inputs)


def test_a_scalar_input_gets_the_gradient_of_all_micro_batches():
    scale = torch.tensor(2.0, requires_grad=True)
    make_pipe(nn.Sequential(Apply(lambda t: t[0] * t[1])))((torch.ones(6, 4), scale)).sum().backward()
    assert scale.grad == 24


class Hiding(dict):
    pass


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("hide", [lambda x: Hiding(x=x), Slots, lambda x: {x}, lambda x: Hiding(x=[x])])
def test_tensors_hidden_from_the_pytree_are_refused(hide):
    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), Apply(lambda x: (x, hide(x))), Apply(lambda t: t[0])))
    with pytest.raises(TypeError, match=r"a stage's output is a .* that holds tensors which the pipeline cannot see"):
        pipe(torch.ones(6, 4))
    with pytest.raises(TypeError, match=r"input\[1\] is a .* that holds tensors"):
        pipe((torch.ones(6, 4), hide(torch.ones(6, 4))))


# In place


@pytest.mark.parametrize("place", [0, 1, 2])
def test_in_place_at_the_start_of_a_stage(place):
    def make(function):
        torch.manual_seed(1)
        cells = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
        cells[place] = Apply(lambda x, linear: linear(function(x)), cells[place])
        return nn.Sequential(*cells)

    module, plain = make(lambda x: x.mul_(2).add_(1)), make(lambda x: x * 2 + 1)
    for balance in compositions(3):
        for keep in KEEPS:
            x = torch.linspace(-1, 1, 24).view(6, 4)
            module.zero_grad()
            plain.zero_grad()
            make_pipe(module, balance, checkpoint=keep)(x).square().sum().backward()
            assert torch.equal(x, torch.linspace(-1, 1, 24).view(6, 4))
            PlainLoop(plain)(x).square().sum().backward()
            assert_same(gradients(module), gradients(plain), f"{balance} {keep}")


# Micro-batches shared a 0-dim tensor, so that each saw what the one before had written to it.
@every_keep
def test_a_scalar_input_may_be_written_to(keep):
    module = nn.Sequential(Apply(lambda t: t[0] * t[1].add_(1)), nn.Linear(4, 4))
    scale = torch.tensor(1.0)
    output = make_pipe(module, checkpoint=keep)((torch.ones(6, 4), scale))
    assert torch.equal(output, PlainLoop(nn.Sequential(module[1]))(torch.full((6, 4), 2.0)))
    output.sum().backward()
    assert scale == 1


# A recompute read the caller's tensor, with what had been written to it since.
@every_keep
def test_inputs_may_be_written_to_before_backward(keep):
    module, pipe, plain = nets(keep)
    x = torch.randn(6, 4)
    for run in (pipe, plain):
        buffer = x.clone()
        loss = run(buffer).square().sum()
        if run is pipe:
            buffer.zero_()
        loss.backward()
    assert_same_gradients(module, plain)


# Autograd no longer knows that the one is a view of the other.
@every_keep
def test_writing_to_a_tensor_that_overlaps_with_another_is_refused(keep):
    def make():
        start = Apply(lambda x, linear: (h := linear(x), h[:, 1:]), nn.Linear(4, 4))
        return nn.Sequential(start, Apply(lambda t: t[0].relu_() + t[1].sum()))

    with pytest.raises(RuntimeError, match="modified in place a tensor that it receives together with a view of it"):
        make_pipe(make(), checkpoint=keep)(torch.ones(6, 4))
    assert_as_plain(make, torch.randn(6, 4), balances=[[2]], keeps=(keep,))


def test_writing_to_one_half_of_a_tensor():
    def halves(x, linear):
        h = linear(x)
        return h[:, :2], h[:, 2:]

    def make():
        join = Apply(lambda t: torch.cat([t[0].mul_(2), t[1]], 1))
        return nn.Sequential(Apply(halves, nn.Linear(4, 4)), join, nn.Linear(4, 4))

    assert_as_plain(make, torch.randn(6, 4))


# A gradient inside a cell's forward met activations that were dropped already.
def test_a_cell_may_differentiate_in_its_forward():
    def force(x, energy):
        x = x if x.requires_grad else x.detach().requires_grad_()
        (found,) = torch.autograd.grad(energy(x).tanh().square().sum(), x, create_graph=True)
        return found

    assert_as_plain(lambda: nn.Sequential(nn.Linear(4, 4), Apply(force, nn.Linear(4, 4)), nn.Tanh()), torch.randn(6, 4))
