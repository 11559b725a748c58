"""Draws on accelerators: those of the plain loop, for every way to ask for them and to place the stages."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import Apply, PlainLoop, accelerator, assert_same
from torch import nn

import gpipe
from gpipe.rng import Draws

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]

KIND = getattr(torch.accelerator.current_accelerator(), "type", "cpu")


def placements():
    """Alone on the first device, two stages on it, and one stage on each of two where there are so many."""
    count = torch.accelerator.device_count()
    return [[accelerator()], [accelerator()] * 2] + [[accelerator(0), accelerator(1)]] * (count > 1)


def make_pipe(module, devices, checkpoint="except_last", **options):
    cells = len(module)
    balance = [cells] if len(devices) == 1 else [1, cells - 1]
    return gpipe.GPipe(module, balance, devices=devices, chunks=3, checkpoint=checkpoint, seed=7, **options)


DRAWS = {
    "a device without a number": lambda x: torch.rand(x.shape, device=KIND),
    "both ways in turn": lambda x: torch.rand(x.shape, device=KIND) + 2 * torch.rand(x.shape, device=x.device),
    "like a tensor": torch.rand_like,
    "dropout": lambda x: F.dropout(torch.ones_like(x)),
    "in place": lambda x: torch.empty_like(x).uniform_(),
    "on the CPU": lambda x: torch.rand(x.shape, device="cpu").to(x.device),
    "on both": lambda x: torch.rand(x.shape, device="cpu").to(x.device) + torch.rand_like(x),
}


@pytest.fixture(params=DRAWS.values(), ids=DRAWS)
def noise(request):
    """A net whose cells draw in this way, or not at all; they keep nothing."""
    return nn.Sequential(Apply(lambda x: x + request.param(x)), nn.Tanh(), Apply(lambda x: x * request.param(x)))


# A device without a number is not equal to the one it names: it had a second generator, which repeated the first's.
def test_draws_are_those_of_the_plain_loop(noise):
    x = torch.randn(7, 4)
    expected = PlainLoop(noise)(x.to(accelerator()))
    for devices in placements():
        assert_same([make_pipe(noise, devices)(x).to(accelerator())], [expected], devices)


@pytest.mark.parametrize("checkpoint", ["always", "never"])
def test_recomputes_repeat_the_draws(noise, checkpoint):
    for devices in placements():
        x = torch.randn(7, 4, requires_grad=True)
        make_pipe(noise, devices, checkpoint)(x).sum().backward()
        here = x.detach().to(accelerator()).requires_grad_()
        PlainLoop(noise)(here).sum().backward()
        assert_same([x.grad], [here.grad.cpu()], devices)


def test_draws_where_the_default_device_is_the_accelerator():
    module = nn.Sequential(Apply(lambda x: x + torch.rand(4)), Apply(lambda x: x + torch.rand(4) + torch.rand_like(x)))
    x = torch.randn(7, 4, device=accelerator())
    with torch.device(KIND):
        expected = PlainLoop(module)(x)
        for devices in placements()[:2]:
            assert_same([make_pipe(module, devices)(x)], [expected], devices)


def late(x):
    return x + torch.rand_like(x) if x[0, 0] > 1 else x


@pytest.mark.filterwarnings("always:torch's default generator moved:RuntimeWarning")
@pytest.mark.parametrize("counts", [True, False], ids=["by the offset", "by the state"])
def test_a_draw_that_came_late_is_noticed(monkeypatch, counts):
    monkeypatch.setattr(gpipe.rng, "_offset_tells", lambda device: counts)
    monkeypatch.setattr(gpipe.rng, "_state" if counts else "_offset", None)  # the other way is not taken
    for devices in placements():
        module = nn.Sequential(nn.Dropout(0.0), Apply(late), nn.Dropout(0.5))
        pipe = make_pipe(module, devices)
        x = torch.tensor([[1.0], [2.0], [2.0]]).expand(3, 4)
        with pytest.warns(RuntimeWarning, match=r"default generator moved while stage \d"):
            pipe(x)
        pipe.step = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = pipe(x)
        assert torch.equal(found.to(accelerator()), PlainLoop(module)(x.to(accelerator())))


# Every cell was seeded before every micro-batch, whether it drew or not.
def test_alone_on_a_device_only_cells_that_draw_have_a_scope():
    draws = Draws(2, accelerator(), alone=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with draws.guard("stage 0"):
            with draws.cell(0, 5, True, {}, False):
                torch.ones(3, device=accelerator()).mul(2)
            with draws.cell(1, 6, True, {}, False):
                torch.rand(3, device=accelerator())
            assert [draws.may_draw(cell) for cell in (0, 1)] == [False, True]
            with draws.cell(1, 7, False, {}, False):
                found = torch.rand(3, device=accelerator())
    torch.manual_seed(7)
    assert torch.equal(found, torch.rand(3, device=accelerator()))


def test_the_callers_generator_is_left_as_it_was(noise):
    module = torch.get_device_module(accelerator())
    for devices in placements():
        torch.manual_seed(9)
        before = module.get_rng_state()
        make_pipe(noise, devices)(torch.randn(7, 4))
        assert torch.equal(module.get_rng_state(), before)


# `torch.mps` has no `default_generators`; those of `torch.cuda` and `torch.xpu` are not there before first use.
@pytest.mark.parametrize("has", ["no default generators", "none before it is initialised"])
def test_devices_that_give_out_no_default_generator(monkeypatch, noise, has):
    x = torch.randn(7, 4)
    expected = PlainLoop(noise)(x.to(accelerator()))
    module = torch.get_device_module(accelerator())
    generators = module.default_generators
    if has == "no default generators":
        monkeypatch.delattr(module, "default_generators")
        monkeypatch.setattr(module, "get_rng_state", lambda device: generators[device.index].get_state())
        monkeypatch.setattr(module, "set_rng_state", lambda state, device: generators[device.index].set_state(state))
    else:
        monkeypatch.setattr(module, "default_generators", ())
        monkeypatch.setattr(module, "init", lambda: setattr(module, "default_generators", generators), raising=False)
    for devices in placements()[:2]:
        found = make_pipe(noise, devices)(x)
        assert torch.equal(found, expected)
