"""The promise: the same bits for every number of stages, every balance, every keep, dropout on."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from nets import Apply, PlainLoop, assert_as_plain, assert_same, compositions, gradients, make_pipe
from torch import nn

CELLS = 6
STEPS = 3


class Attention(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.inwards, self.outwards, self.dropout = nn.Linear(width, 3 * width), nn.Linear(width, width), dropout

    def forward(self, x):
        q, k, v = self.inwards(x).chunk(3, dim=-1)
        return x + self.outwards(F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout))


def net(dropout):
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(5, 8),
        Attention(8, dropout),
        nn.Dropout(dropout),
        nn.LayerNorm(8),
        nn.Sequential(nn.Linear(8, 7), nn.GELU(), nn.Dropout(dropout)),
        nn.Linear(7, 3),
    )


@cache
def data(rows):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 3, 5, generator=generator), torch.randint(0, 3, (rows, 3), generator=generator)


def trained(run, module, rows):
    x, y = data(rows)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(run(x).transpose(1, 2), y).backward()
        optimizer.step()
    return module.state_dict()


@cache
def plain_weights(rows, chunks):
    module = net(0.1)
    return trained(PlainLoop(module, chunks), module, rows)


BALANCES = [balance for balance in compositions(CELLS) if len(balance) in (1, 2, 3, 6)]


def test_balances_are_all_there_are():
    assert len(BALANCES) == 1 + 5 + 10 + 1
    assert all(sum(balance) == CELLS for balance in BALANCES)


@pytest.mark.parametrize("keep", ["always", "except_last", "never"])
@pytest.mark.parametrize("chunks", [4, 5])
@pytest.mark.parametrize("rows", [12, 11])
def test_same_weights_to_the_last_bit(rows, chunks, keep):
    expected = plain_weights(rows, chunks)
    for balance in BALANCES:
        module = net(0.1)
        found = trained(make_pipe(module, balance, chunks, keep), module, rows)
        assert_same(found, expected, f"balance {balance}")


def test_dropout_is_on_and_depends_on_the_seed():
    module = net(0.1)
    other = trained(make_pipe(module, [3, 3], 4, seed=8), module, 12)
    assert not torch.equal(other["0.weight"], plain_weights(12, 4)["0.weight"])


def test_keep_may_differ_between_stages():
    for keep in [(0, 2, 1), (4, 0, 4), (1, 4, 0)]:
        module = net(0.1)
        found = trained(make_pipe(module, [2, 3, 1], 4, keep), module, 12)
        assert_same(found, plain_weights(12, 4), f"keep {keep}")


@pytest.mark.parametrize("rows", [12, 11])
def test_gradients_equal_those_of_the_whole_batch(rows):
    x, y = data(rows)
    module = net(0.0).double()
    F.cross_entropy(module(x.double()).transpose(1, 2), y).backward()
    expected = gradients(module)
    for balance in ([6], [2, 4], [1, 3, 2], [1] * 6):
        for keep in ("always", "except_last", "never"):
            module.zero_grad()
            output = make_pipe(module, balance, 5, keep)(x.double())
            F.cross_entropy(output.transpose(1, 2), y).backward()
            torch.testing.assert_close(gradients(module), expected, rtol=1e-11, atol=1e-14)


def test_the_seed_is_drawn_from_torchs_default_generator():
    def first_output():
        module = net(0.5)
        torch.manual_seed(3)
        return make_pipe(module, [6], seed=None)(data(12)[0])

    assert torch.equal(first_output(), first_output())


def test_two_pipes_at_once():
    modules = [net(0.1), net(0.1)]
    pipes = [make_pipe(modules[0], [2, 4], 4), make_pipe(modules[1], [3, 2, 1], 4)]
    x, y = data(12)
    optimizers = [torch.optim.Adam(m.parameters(), 0.01) for m in modules]
    for _ in range(STEPS):
        outputs = [pipe(x) for pipe in pipes]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(output.transpose(1, 2), y).backward()
            optimizer.step()
    for module in modules:
        assert_same(module.state_dict(), plain_weights(12, 4))


# A tensor in two places of a boundary became two tensors: gradients added up in another order.
def test_a_tensor_twice_in_a_boundary():
    def twice(x, linear):
        h = linear(x)
        return h, {"again": h}

    def used_in_turns(t):
        h, again = t[0], t[1]["again"]
        return h.sin() + again.exp() * h.cos() + again**2

    assert_as_plain(
        lambda: nn.Sequential(Apply(twice, nn.Linear(4, 4)), Apply(used_in_turns), nn.Linear(4, 4)), torch.randn(6, 4)
    )


# ... and a write to the one was not known to the graph of the other.
def test_a_tensor_twice_in_a_boundary_and_written_to():
    assert_as_plain(
        lambda: nn.Sequential(
            Apply(lambda x, linear: (linear(x),) * 2, nn.Linear(4, 4)),
            Apply(lambda t: t[0].relu_() + t[1]),
            nn.Linear(4, 4),
        ),
        torch.randn(6, 4),
    )


# Recompute's input was a compact copy: sums over it went another way than over the view it was copied from.
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(lambda h: h.repeat(1, 30)[:, 3:77], id="columns of a wider tensor"),
        pytest.param(lambda h: h[:, :, None].expand(-1, -1, 50), id="expanded"),
        pytest.param(lambda h: h.t().contiguous().t(), id="transposed"),
    ],
)
def test_boundaries_keep_their_strides(cut):
    def sums(h):
        return h.flatten(1)[:, :4] * h.var() + h.sum() * h.mean()

    assert_as_plain(
        lambda: nn.Sequential(Apply(lambda x, linear: cut(linear(x)), nn.Linear(4, 4)), Apply(sums), nn.Linear(4, 4)),
        torch.randn(6, 4),
    )


# MKL's product of doubles depends on whether rows start at 16 bytes; micro-batches of an odd number of elements do not.
def test_micro_batches_keep_their_alignment():
    x = torch.randn(63 * 3, 127, dtype=torch.float64)

    def make():
        return nn.Sequential(nn.Linear(127, 128), nn.Tanh(), nn.Linear(128, 3)).double()

    assert_as_plain(make, x, balances=[[3], [1, 2]])
