"""Buffers that forward changes: as in the plain loop, whatever is recomputed."""

import pytest
import torch
from nets import Apply, PlainLoop, assert_as_plain, assert_same, gradients, linears, make_pipe
from torch import nn

from gpipe import is_recomputing
from gpipe.testing import assert_exact


class Counter(nn.Module):
    """Counts its calls, in place, by assignment, or through ``.data``, and uses the count."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("constant", torch.ones(4))

    def forward(self, x):
        if self.training:
            if self.how == "in place":
                self.calls += 1
            elif self.how == "assigned":
                self.calls = self.calls + 1
            else:
                self.calls.data.add_(1)
        return self.linear(x) * (1 + self.calls) * self.constant


@pytest.mark.parametrize("how", ["in place", "assigned", "data"])
def test_counters(how):
    def make():
        return nn.Sequential(nn.Linear(4, 4), Counter(how), nn.Tanh(), Counter(how))

    assert_as_plain(make, torch.randn(6, 4))


# Not with the plain loop's one graph: a parameter that a micro-batch uses twice is summed in another order there.
def test_spectral_norm():
    module = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4), n_power_iterations=2),
    )
    assert_exact(module, torch.randn(7, 4), checkpoints=[0, 1, 2, 4])


def test_spectral_norm_added_after_wrapping():
    found = []
    for keep in (0, 99):
        torch.manual_seed(1)
        module = linears()
        pipe = make_pipe(module, checkpoint=keep)
        pipe(torch.ones(6, 4)).sum().backward()
        nn.utils.parametrizations.spectral_norm(module[1])
        module.zero_grad()
        pipe(torch.linspace(-1, 1, 24).view(6, 4)).square().sum().backward()
        found.append(gradients(module) | module.state_dict())
    assert_same(*found)


def test_spectral_norm_of_a_frozen_start():
    def make():
        frozen = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).requires_grad_(False)
        return nn.Sequential(frozen, nn.Linear(4, 4))

    assert_as_plain(make, torch.randn(6, 4))


class ChangesOnLargeInputs(nn.Module):
    """Its buffer is not changed by the forwards that show which buffers change."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        if (x > 9).any():
            if self.in_place:
                self.scale *= 2
            else:
                self.scale = self.scale * 2
        return self.linear(x) * self.scale


SMALL = torch.ones(6, 4)
LATE = torch.ones(6, 4)
LATE[2:] *= 10  # large from the second micro-batch on


# Which buffers change was learned from one forward; what changed later only, the recompute changed once more.
def test_a_buffer_that_begins_to_change():
    module = nn.Sequential(ChangesOnLargeInputs(in_place=True), nn.Linear(4, 4))
    pipe = make_pipe(module, checkpoint="always")
    pipe(SMALL).sum().backward()
    loss = pipe(LATE).sum()
    with pytest.raises(RuntimeError, match="the buffer 'scale' of ChangesOnLargeInputs was modified in place after"):
        loss.backward()
    assert module[0].scale == 4
    pipe(LATE).sum().backward()
    assert module[0].scale == 16


def test_a_buffer_that_begins_to_be_replaced():
    results = []
    for keep in ("always", "never"):
        torch.manual_seed(1)
        module = nn.Sequential(ChangesOnLargeInputs(in_place=False), nn.Linear(4, 4))
        pipe = make_pipe(module, checkpoint=keep)
        for x in (SMALL, LATE, LATE):
            pipe(x).sum().backward()
        results.append(gradients(module) | {"scale": module[0].scale})
    assert_same(*results)


def test_retained_graphs_recompute_from_the_same_buffers():
    torch.manual_seed(1)
    module = nn.Sequential(Counter("in place"), nn.Tanh())
    torch.manual_seed(1)
    plain = nn.Sequential(Counter("in place"), nn.Tanh())
    for run in (make_pipe(module, checkpoint="always"), PlainLoop(plain)):
        loss = run(torch.ones(6, 4)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same(gradients(module), gradients(plain))
    assert module[0].calls == plain[0].calls == 3


def test_second_forward_before_the_first_backward():
    torch.manual_seed(1)
    module = nn.Sequential(Counter("in place"), nn.Tanh())
    torch.manual_seed(1)
    plain = nn.Sequential(Counter("in place"), nn.Tanh())
    for run in (make_pipe(module, checkpoint="always"), PlainLoop(plain)):
        first, second = run(torch.ones(6, 4)).square().sum(), run(torch.ones(6, 4)).square().sum()
        first.backward()
        second.backward()
    assert_same(gradients(module), gradients(plain))
    assert module[0].calls == plain[0].calls == 6


def test_a_failing_recompute_leaves_the_buffers():
    def fail(x):
        if is_recomputing():
            raise ValueError("boom")
        return x

    module = nn.Sequential(Counter("in place"), Apply(fail))
    loss = make_pipe(module, [2], checkpoint="always")(torch.ones(6, 4)).sum()
    with pytest.raises(ValueError, match="boom"):
        loss.backward()
    assert module[0].calls == 3


class Late(nn.Module):
    """Its state is made by the first forward."""

    def __init__(self, declared):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if declared:
            self.register_buffer("state", None)

    def forward(self, x):
        x = self.linear(x)
        if getattr(self, "state", None) is None:
            self.register_buffer("state", torch.zeros(4))
        self.state = 0.9 * self.state + 0.1 * x.detach().mean(0)
        return x * (1 + self.state)


# A recompute of the first micro-batch found the state that the last one had left, and went on from there.
@pytest.mark.parametrize("declared", [True, False])
def test_a_buffer_that_the_first_forward_makes(declared):
    assert_as_plain(lambda: nn.Sequential(Late(declared), nn.Linear(4, 4), Late(declared)), torch.randn(6, 4))
