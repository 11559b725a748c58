"""Hooks, clipping, scaling, schedules and optimisers work on the parameters of a pipe."""

import pytest
import torch
from nets import assert_same, assert_same_gradients, every_keep, gradients, nets
from torch import nn


@every_keep
def test_hooks_fire_once_with_the_whole_gradient(keep):
    module, pipe, plain = nets(keep)
    calls = []
    for run, its in ((pipe, module), (plain, plain.module)):
        before, after = [], []
        its[0].weight.register_hook(lambda g, before=before: before.append(g.clone()) or g * 2)
        its[1].weight.register_post_accumulate_grad_hook(lambda p, after=after: after.append(p.grad.clone()))
        for _ in range(2):
            run(torch.ones(6, 4)).square().sum().backward()
        assert (len(before), len(after)) == (2, 2)
        calls.append(before + after)
    assert_same(*calls)
    assert_same_gradients(module, plain)


def test_an_optimizer_step_in_a_hook():
    module, pipe, plain = nets("always")
    for run, its in ((pipe, module), (plain, plain.module)):
        optimizers = {p: torch.optim.Adam([p], 0.1) for p in its.parameters()}

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in its.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            run(torch.ones(6, 4)).square().sum().backward()
    assert_same(module.state_dict(), plain.module.state_dict())


def test_output_hooks():
    _, pipe, _ = nets("except_last")
    y = pipe(torch.ones(6, 4))
    seen = []
    y.register_hook(lambda g: seen.append(g))
    y.retain_grad()
    y.sum().backward()
    assert len(seen) == 1
    assert torch.equal(y.grad, torch.ones(6, 4))


@every_keep
def test_clipping_the_gradient_norm(keep):
    module, pipe, plain = nets(keep)
    norms = []
    for run, its in ((pipe, pipe), (plain, plain.module)):
        run(torch.ones(6, 4)).square().sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(its.parameters(), 0.1))
    assert torch.equal(*norms)
    assert_same_gradients(module, plain)


def test_grad_scaler():
    module, pipe, plain = nets("always")
    for run, its in ((pipe, pipe), (plain, plain.module)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(its.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            scale = float("inf") if step == 1 else 1.0
            scaler.scale(run(torch.ones(6, 4)).square().sum() * scale).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0
    assert_same(module.state_dict(), plain.module.state_dict())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        lambda p: torch.optim.Adagrad(p, 0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
        lambda p: torch.optim.Adafactor(p, 0.1),
    ],
)
def test_optimizers_and_schedules(optimizer):
    module, pipe, plain = nets("except_last")
    for run, its in ((pipe, pipe), (plain, plain.module)):
        chosen = optimizer(its.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, 3)

        def closure(run=run, chosen=chosen):
            chosen.zero_grad()
            loss = run(torch.ones(6, 4)).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            chosen.step(closure)
            schedule.step()
    assert_same(module.state_dict(), plain.module.state_dict())


def test_sparse_gradients():
    def make():
        return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))

    module, pipe, plain = nets("always", make)
    tokens = torch.tensor([[1, 2], [3, 1], [8, 0], [2, 2]])
    for run, its in ((pipe, module), (plain, plain.module)):
        run(tokens).square().sum().backward()
        torch.optim.SparseAdam([its[0].weight], 0.1).step()
    assert module[0].weight.grad.is_sparse
    assert_same(module.state_dict(), plain.module.state_dict())


def test_a_parameter_used_outside_the_pipe_too():
    module, pipe, plain = nets("always")
    for run, its in ((pipe, module), (plain, plain.module)):
        (run(torch.ones(6, 4)) @ its[0].weight).square().sum().backward()
    torch.testing.assert_close(gradients(module), gradients(plain.module))
