"""``train_step`` with a ``GradScaler``: a scaled loss goes backward, and all else is as without."""

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, gradients, linears, make_pipe
from torch import nn

WAYS = [
    {"loss_over": "mini_batch"},
    {"loss_over": "mini_batch", "schedule": "gpipe_zero_bubble"},
    {"loss_over": "mini_batch", "two_pass": True},
    *({"loss_over": "micro_batch", "schedule": name} for name in ("gpipe", "one_f_one_b", "zero_bubble_h1")),
]
NAMES = ["mini_batch", "zero_bubble", "two_pass", "micro_batch", "one_f_one_b", "zero_bubble_h1"]


class Gain(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, output, target):
        return F.mse_loss(output * self.gain, target)


def stepped(balance, way, scaler):
    """The loss of a step, and the gradients of parameters, loss and input."""
    torch.manual_seed(1)
    module, loss_fn = linears(), Gain()
    pipe = make_pipe(module, balance, chunks=4, checkpoint="never")
    x = torch.randn(11, 4, requires_grad=True)
    loss = pipe.train_step(x, torch.randn(11, 4), loss_fn, **way, scaler=scaler)
    assert not loss.requires_grad
    return loss, {"gain": loss_fn.gain.grad, "input": x.grad} | gradients(module)


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
@pytest.mark.parametrize("balance", [[3], [1, 2], [1, 1, 1]], ids=["1", "2", "3"])
def test_the_loss_is_not_scaled_and_the_gradients_are(balance, way):
    expected_loss, expected = stepped(balance, way, None)
    loss, found = stepped(balance, way, torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert torch.equal(loss, expected_loss)
    assert_same({name: gradient / 1024 for name, gradient in found.items()}, expected)
    assert_same(dict(stepped(balance, way, torch.amp.GradScaler("cpu", enabled=False))[1]), expected)


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_a_step_without_finite_gradients_is_skipped(way):
    module = linears()
    pipe = make_pipe(module, chunks=4, checkpoint="never")
    optimizer, scaler = torch.optim.SGD(pipe.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = torch.randn(2, 8, 4)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    pipe.train_step(x, y * float("inf"), F.mse_loss, **way, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512
    assert_same(dict(module.named_parameters()), before)
    optimizer.zero_grad()
    pipe.train_step(x, y, F.mse_loss, **way, scaler=scaler)
    scaler.step(optimizer)
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_gradients_of_several_steps_add_up_scaled(loss_over):
    pipe = make_pipe(linears(), chunks=2)
    x, y = torch.randn(2, 8, 4)
    pipe.train_step(x, y, F.mse_loss, loss_over)
    pipe.train_step(x, y, F.mse_loss, loss_over)
    expected = gradients(pipe)
    pipe.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pipe.train_step(x, y, F.mse_loss, loss_over, scaler=scaler)
    pipe.train_step(x, y, F.mse_loss, loss_over, scaler=scaler)
    scaler.unscale_(torch.optim.SGD(pipe.parameters(), 0.1))
    assert_same(gradients(pipe), expected)


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_what_does_not_scale_is_refused_before_any_work(loss_over):
    pipe = make_pipe(linears())
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, or None, got float"):
        pipe.train_step(torch.ones(3, 4), torch.ones(3, 4), F.mse_loss, loss_over, scaler=1024.0)
    assert pipe.step == 0
