"""Random draws depend on (seed, step, micro-batch, cell) and on nothing else."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import Apply, PlainLoop, assert_as_plain, assert_same, gradients, make_pipe
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint

from gpipe import cell_seed
from gpipe.partitioning.live import LiveBytes
from gpipe.rng import CellGenerators, Draws

KEEPS = ("always", "except_last", "never")


def test_cell_seeds_are_what_they_were():
    assert cell_seed(0, 0, 0, 0) == 1195769770526638388
    assert cell_seed(7, 1, 2, 3) == 8430123444911134481
    assert cell_seed(-1, 0, 0, 0) == cell_seed(2**64 - 1, 0, 0, 0)


def test_cell_seeds_differ_and_fit():
    seeds = {cell_seed(s, t, m, c) for s in range(5) for t in range(10) for m in range(10) for c in range(10)}
    assert len(seeds) == 5000
    assert len({seed % 2**32 for seed in seeds}) == 5000  # what the CPU's generator makes of them
    assert all(0 <= seed < 2**63 for seed in seeds)
    halves = sum(bin(seed).count("1") for seed in seeds) / (63 * len(seeds))
    assert abs(halves - 0.5) < 0.01
    torch.manual_seed(max(seeds))


def noisy(draw):
    """A net whose middle cell multiplies by what ``draw`` makes of the shape of its input."""
    return lambda: nn.Sequential(nn.Linear(4, 4), Apply(lambda x: x * draw(x)), nn.Linear(4, 4))


DRAWS = {
    "rand": lambda x: torch.rand(x.shape),
    "rand, generator None": lambda x: torch.rand(x.shape, generator=None),
    "rand, out": lambda x: torch.rand(x.shape, out=torch.empty(x.shape)),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(*x.shape),
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(1, 9, x.shape),
    "randint, no low": lambda x: torch.randint(9, x.shape),
    "randint_like": lambda x: torch.randint_like(x, 1, 9),
    "randint_like, no low": lambda x: torch.randint_like(x, 9),
    "randperm": lambda x: torch.randperm(x.shape[1]),
    "normal, float": lambda x: torch.normal(0.0, 1.0, x.shape),
    "normal, tensors": lambda x: torch.normal(x.detach(), torch.ones_like(x)),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli, p": lambda x: torch.bernoulli(torch.empty_like(x), 0.5),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "bernoulli_, tensor": lambda x: torch.empty_like(x).bernoulli_(torch.full_like(x, 0.5)),
    "multinomial": lambda x: torch.multinomial(torch.ones(x.shape[1]), x.shape[1]),
    "multinomial, replacement": lambda x: torch.multinomial(torch.ones(9), x.shape[1], replacement=True),
    "poisson": lambda x: torch.poisson(torch.full_like(x, 3.0)),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 9.0), torch.full_like(x, 0.5)),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "random_": lambda x: torch.empty_like(x).random_(9),
    "random_, to": lambda x: torch.empty_like(x).random_(1, 9),
    "gamma": lambda x: torch.distributions.Gamma(torch.full_like(x, 2.0), 1.0).sample(),
    "dirichlet": lambda x: torch.distributions.Dirichlet(torch.ones_like(x)).sample(),
    "dropout": lambda x: F.dropout(torch.ones_like(x)),
    "dropout, in place": lambda x: F.dropout(torch.ones_like(x), inplace=True),
    "native_dropout": lambda x: torch.native_dropout(torch.ones_like(x), 0.5, True)[0],
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "feature_dropout": lambda x: F.dropout1d(torch.ones_like(x)),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "rrelu_": lambda x: F.rrelu(x.clone(), training=True, inplace=True),
    "gumbel_softmax": F.gumbel_softmax,
    "fractional_max_pool": lambda x: F.fractional_max_pool2d(x[None, :, None].repeat(1, 1, 4, 1), 2, 2).sum(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "several": lambda x: torch.rand_like(x) + F.dropout(x) * torch.randn(x.shape),
    "trunc_normal_": lambda x: nn.init.trunc_normal_(torch.empty_like(x)),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_random_operator_draws_as_in_the_plain_loop(draw):
    assert_as_plain(noisy(draw), torch.randn(6, 4), balances=[[3], [1, 1, 1]], keeps=(0, 99))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_no_random_operator_touches_the_global_generator(draw):
    pipe = make_pipe(noisy(draw)(), checkpoint="always")
    torch.manual_seed(9)
    before = torch.get_rng_state()
    pipe(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


LAYERS = {
    "MultiheadAttention": Apply(lambda x, m: m(x, x, x)[0], nn.MultiheadAttention(4, 2, dropout=0.5)),
    "MultiheadAttention, no weights": Apply(
        lambda x, m: m(x, x, x, need_weights=False)[0], nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
    ),
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    "LSTM": Apply(lambda x, m: m(x)[0], nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True)),
    "GRU": Apply(lambda x, m: m(x)[0], nn.GRU(4, 4, 2, dropout=0.5, batch_first=True)),
    "RNN": Apply(lambda x, m: m(x)[0], nn.RNN(4, 4, 2, dropout=0.5, batch_first=True)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_every_random_layer_draws_as_in_the_plain_loop(layer, mode):
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4))
    x = torch.randn(6, 3, 4)
    with mode():
        expected = PlainLoop(module)(x)
        for keep in KEEPS:
            found = make_pipe(module, checkpoint=keep)(x)
            assert torch.equal(found, expected)
            if mode is torch.enable_grad:
                gradients_of = [
                    torch.autograd.grad(y.sum(), list(module.parameters()), retain_graph=True)
                    for y in (found, expected)
                ]
                torch.testing.assert_close(*gradients_of)


# Under inference_mode composite operators arrive whole, and draw where no mode sees them.
@pytest.mark.parametrize("name", ["dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu"])
def test_draws_under_inference_mode(name):
    module = nn.Sequential(Apply(DRAWS[name]))
    pipe = make_pipe(module)
    x = torch.randn(6, 4)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with torch.inference_mode():
        found = pipe(x)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(found, PlainLoop(module)(x))


class OwnGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.generator) + torch.rand(x.shape, generator=self.generator)
        return F.dropout(self.linear(x) * noise)


# A recompute drew on from where forward had stopped.
def test_a_generator_of_the_cells_own():
    def make():
        return nn.Sequential(nn.Linear(4, 4), OwnGenerator(), nn.Tanh(), OwnGenerator())

    assert_as_plain(make, torch.randn(6, 4))
    module, plain = make(), make()
    make_pipe(module, checkpoint="always")(torch.ones(6, 4)).sum().backward()
    PlainLoop(plain)(torch.ones(6, 4)).sum().backward()
    assert torch.equal(module[1].generator.get_state(), plain[1].generator.get_state())


def test_a_generator_of_the_cells_own_with_a_retained_graph():
    results = []
    for wrap in (lambda m: make_pipe(m, checkpoint="always"), PlainLoop):
        torch.manual_seed(1)
        module = nn.Sequential(OwnGenerator(), nn.Tanh())
        loss = wrap(module)(torch.ones(6, 4)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(gradients(module))
    assert_same(*results)


def test_draws_follow_the_seed_the_step_the_micro_batch_and_the_cell():
    def draws(**options):
        pipe = make_pipe(nn.Sequential(Apply(torch.rand_like), Apply(lambda x: (x, torch.rand_like(x)))), **options)
        return [pipe(torch.ones(3, 4)) for _ in range(2)]

    values = torch.cat([leaf for step in draws() for leaf in step] + [leaf for step in draws(seed=8) for leaf in step])
    assert len({tuple(row.tolist()) for row in values}) == 3 * 2 * 2 * 2


def test_the_step_can_be_set():
    pipe = make_pipe(nn.Sequential(Apply(torch.rand_like)))
    first, second = pipe(torch.ones(3, 4)), pipe(torch.ones(3, 4))
    pipe.step = 0
    assert torch.equal(pipe(torch.ones(3, 4)), first)
    assert torch.equal(pipe(torch.ones(3, 4)), second)


def test_threads_that_draw_at_once_do_not_disturb_each_other():
    barrier = threading.Barrier(3)

    def together(x):
        barrier.wait(timeout=10)
        return x + torch.rand(50).sum() + F.dropout(x) + torch.native_dropout(x, 0.5, True)[0]

    modules = [nn.Sequential(Apply(together)) for _ in range(3)]
    expected = []
    for module in modules:
        barrier = threading.Barrier(1)
        expected.append(PlainLoop(module, 4)(torch.ones(4, 8)))
    barrier = threading.Barrier(3)
    found = [None] * 3

    def run(i):
        found[i] = make_pipe(modules[i], chunks=4)(torch.ones(4, 8))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert_same(found, expected)


@pytest.mark.filterwarnings("always:torch's default generator moved:RuntimeWarning")
def test_the_guard_notices_a_draw_that_came_late():
    def late(x):
        return x + torch.rand_like(x) if x[0, 0] > 1 else x

    module = nn.Sequential(nn.Linear(4, 4), Apply(late))
    module[0].requires_grad_(False)
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4))
        module[0].bias.zero_()
    pipe = make_pipe(module, chunks=2)
    x = torch.tensor([[1.0], [2.0]]).expand(2, 4)
    with pytest.warns(RuntimeWarning, match=r"default generator moved while stage \d"):
        pipe(x)
    pipe.step = 0
    torch.manual_seed(9)
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pipe(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, PlainLoop(module, 2)(x))


def test_the_guard_is_silent_where_nothing_moves():
    draws = Draws(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with draws.guard("stage 0"), draws.cell(0, 5, True, {}, False):
            torch.rand(3)


# Its recompute, in backward, drew from the global generator: other masks than forward's, and nobody saw it.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_draws_inside_torchs_own_checkpoint_are_refused(reentrant):
    def inner(x, linear):
        return checkpoint(lambda x: F.dropout(linear(x)), x, use_reentrant=reentrant)

    module = nn.Sequential(nn.Linear(4, 4), Apply(inner, nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match=r"inside torch.utils.checkpoint.*GPipe\(checkpoint='always'\)"):
        make_pipe(module)(torch.ones(6, 4))
    with torch.no_grad():
        assert torch.equal(make_pipe(module)(torch.ones(6, 4)), PlainLoop(module)(torch.ones(6, 4)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_own_checkpoint_without_draws(reentrant):
    def inner(x, linear):
        return checkpoint(lambda x: linear(x).tanh(), x, use_reentrant=reentrant)

    assert_as_plain(lambda: nn.Sequential(nn.Linear(4, 4), Apply(inner, nn.Linear(4, 4)), nn.Tanh()), torch.randn(6, 4))


# Before 2.14 torch's own checkpoint leaves its hooks on the thread where an error passes through it.
@pytest.mark.parametrize("wrap", [False, True])
def test_errors_inside_torchs_own_checkpoint_leave_nothing_on_the_workers(wrap):
    fails = [True]

    def sometimes(x):
        if fails:
            raise ValueError("boom")
        return x.tanh()

    def inner(x, linear):
        try:
            return checkpoint(lambda x: checkpoint(sometimes, linear(x), use_reentrant=False), x, use_reentrant=False)
        except ValueError as error:
            raise (RuntimeError("boom again") if wrap else error) from None

    module = nn.Sequential(nn.Linear(4, 4), Apply(inner, nn.Linear(4, 4)), nn.Tanh())
    pipe, x = make_pipe(module), torch.randn(6, 4)
    with pytest.raises((ValueError, RuntimeError), match="boom") as held:
        pipe(x)
    fails.clear()
    pipe(x).square().sum().backward()
    found = gradients(module)
    module.zero_grad()
    PlainLoop(module)(x).square().sum().backward()
    assert_same(found, gradients(module))
    del held


# Entered and left by several threads in turn, torch's own bookkeeping of modes said for ever that one was on, and
# torch.compile did nothing any more.
@pytest.mark.parametrize("make", [lambda: CellGenerators(None), LiveBytes])
def test_modes_of_several_threads_leave_no_trace(make):
    first, second = make(), make()
    entered, left = threading.Event(), threading.Event()

    def other():
        with second:
            entered.set()
            left.wait(timeout=10)

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        entered.wait(timeout=10)
    left.set()
    thread.join()
    assert not is_in_torch_dispatch_mode()


def test_branches_of_operators_of_higher_order_draw_from_the_cells_seed():
    def either(x):
        return torch.cond(x.sum() > 0, lambda x: x + torch.rand_like(x), lambda x: x.cos(), (x,))

    module = nn.Sequential(Apply(either))
    with torch.no_grad():
        found = make_pipe(module)(torch.ones(6, 4))
        assert torch.equal(found, make_pipe(module)(torch.ones(6, 4)))
        assert torch.equal(found, PlainLoop(module)(torch.ones(6, 4)))


def test_attention_without_dropout_draws_nothing():
    mode = CellGenerators(None)
    x = torch.randn(2, 3, 4)
    for p in (0.0, 0.5):
        with torch.inference_mode(), mode.running(5, {}, False):
            F.scaled_dot_product_attention(x, x, x, dropout_p=p)
        assert mode.drew == bool(p)
