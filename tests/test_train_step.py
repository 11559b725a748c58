"""``train_step``: forward, loss and backward in one call."""

import pytest
import torch
import torch.nn.functional as F
from nets import KEEPS, Island, assert_same, assert_same_gradients, compositions, gradients, linears, make_pipe, nets
from torch import nn


@pytest.mark.parametrize("rows", [12, 11])
@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step(rows, loss_over):
    x, y = torch.randn(rows, 4, dtype=torch.float64), torch.randint(0, 3, (rows,))

    def make():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    for balance in compositions(3):
        for keep in KEEPS:
            module, pipe, plain = nets(keep, make, balance, chunks=5)
            loss = pipe.train_step(x, y, F.cross_entropy, loss_over)
            expected = F.cross_entropy(plain.module(x), y)
            expected.backward()
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(gradients(module), gradients(plain.module), rtol=1e-11, atol=1e-14)
            assert pipe.step == 1


class LearnedLoss(nn.Module):
    """With a parameter, a draw, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, target):
        self.calls += 1
        return ((F.dropout(output, 0.5) * self.scale - target) ** 2).mean()


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step_of_a_loss_with_parameters(loss_over):
    x, y = torch.randn(2, 12, 4)
    results = []
    for balance in compositions(3):
        for keep in KEEPS:
            torch.manual_seed(1)
            module, loss_fn = linears(), LearnedLoss()
            pipe = make_pipe(module, balance, 4, keep)
            loss = pipe.train_step(x, y, loss_fn, loss_over)
            assert loss_fn.calls == (4 if loss_over == "micro_batch" else 1), keep
            assert loss_fn.scale.grad != 0
            results.append({"loss": loss, "scale": loss_fn.scale.grad} | gradients(module))
            assert_same(results[-1], results[0], f"{balance} {keep}")


def test_train_step_keeps_hooks_and_earlier_gradients():
    module, pipe, _ = nets("always")
    x, y = torch.randn(2, 6, 4)
    seen = []
    module[0].weight.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(2):
        pipe.train_step(x, y, F.mse_loss, "micro_batch")
    assert len(seen) == 2
    assert torch.equal(module[0].weight.grad, seen[0] + seen[1])


def test_train_step_passes_gradients_to_the_input():
    _, pipe, plain = nets("always", chunks=1)
    x, y = torch.randn(2, 6, 4)
    grads = []
    for run in (
        lambda x: pipe.train_step(x, y, F.mse_loss, "micro_batch"),
        lambda x: F.mse_loss(plain(x), y).backward(),
    ):
        x.grad = None
        x.requires_grad_()
        run(x)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("targets", [None, 2.0, torch.tensor(2.0), {"value": 2.0}])
def test_train_step_targets_without_rows(targets):
    def loss_fn(output, target):
        target = target["value"] if isinstance(target, dict) else target
        return (output * (2.0 if target is None else target)).mean()

    losses = []
    for loss_over in ("mini_batch", "micro_batch"):
        _, pipe, _ = nets("always")
        losses.append(pipe.train_step(torch.ones(6, 4), targets, loss_fn, loss_over))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"targets": torch.ones(5, 4)}, ValueError, "inputs have 6 rows, targets have 5"),
        ({"loss_fn": None}, TypeError, "loss_fn must be callable"),
        ({"loss_fn": lambda output, target: output}, ValueError, r"one floating-point number, got shape \("),
        ({"loss_fn": lambda output, target: 1.0}, TypeError, "loss_fn must return a tensor, got float"),
        ({"loss_fn": lambda output, target: output.argmax()}, ValueError, "torch.int64"),
        ({"inputs": 3}, TypeError, "at least one tensor with a batch dimension"),
    ],
)
def test_train_step_refuses(loss_over, arguments, error, match):
    module, pipe, _ = nets("always")
    given = {"inputs": torch.ones(6, 4), "targets": torch.ones(6, 4), "loss_fn": F.mse_loss} | arguments
    with pytest.raises(error, match=match):
        pipe.train_step(**given, loss_over=loss_over)
    assert all(p.grad is None for p in module.parameters())
    pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), F.mse_loss, loss_over)


def test_train_step_needs_gradients_and_a_known_word():
    _, pipe, _ = nets("always")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match="train_step computes gradients: call it outside"):
            pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), F.mse_loss)
    with pytest.raises(ValueError, match="loss_over must be 'mini_batch' or 'micro_batch', got 'batch'"):
        pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), F.mse_loss, "batch")


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step_without_rows(loss_over):
    _, pipe, _ = nets("always")
    assert pipe.train_step(torch.ones(0, 4), torch.ones(0, 4), F.mse_loss, loss_over).isnan()


# train_step ran backward in the caller's autocast over the mini-batch, but not over micro-batches.
@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step_goes_backward_outside_of_autocast(loss_over):
    module, pipe, plain = nets("always", lambda: nn.Sequential(nn.Linear(4, 4), Island(), nn.Linear(4, 4)), chunks=1)
    x, y = torch.randn(2, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        pipe.train_step(x, y, F.mse_loss, loss_over)
        loss = F.mse_loss(plain(x), y)
    loss.backward()
    assert_same_gradients(module, plain)
