"""Random nets, balances, chunks and keeps against the unpipelined module."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import Apply, PlainLoop, assert_same, gradients, make_pipe
from torch import nn

WIDTH = 4


def fork(x):
    return x, {"twice": x * 2, "sign": x > 0}


def join(t):
    return t[0] + t[1]["twice"] * t[1]["sign"]


# What may stand in a net, each from (rows, WIDTH) to (rows, WIDTH); a list is several cells.
PARTS = {
    "linear": lambda: [nn.Linear(WIDTH, WIDTH)],
    "no bias": lambda: [nn.Linear(WIDTH, WIDTH, bias=False)],
    "norm": lambda: [nn.LayerNorm(WIDTH)],
    "in place": lambda: [nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.3, inplace=True)],
    "tanh": lambda: [nn.Tanh()],
    "identity": lambda: [nn.Identity()],
    "residual": lambda: [Apply(lambda x, linear: x + linear(x).sigmoid(), nn.Linear(WIDTH, WIDTH))],
    "frozen": lambda: [nn.Linear(WIDTH, WIDTH).requires_grad_(False)],
    "pair": lambda: [Apply(fork), Apply(join)],
    "view": lambda: [Apply(lambda x: x.repeat(1, 3)[:, 2 : 2 + WIDTH])],
}
DRAWING = {
    "dropout": lambda: [nn.Dropout(0.3)],
    "noise": lambda: [Apply(lambda x: x + torch.randn_like(x) * torch.rand(1))],
}


@st.composite
def pipelines(draw, parts):
    names = draw(st.lists(st.sampled_from(sorted(parts)), min_size=1, max_size=5))

    def make():
        torch.manual_seed(5)
        cells = [cell for name in names for cell in parts[name]()]
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), *cells).double()

    cells = len(make())
    cuts = sorted(draw(st.sets(st.integers(1, cells - 1), max_size=4))) if cells > 1 else []
    balance = [b - a for a, b in zip([0, *cuts], [*cuts, cells], strict=True)]
    chunks = draw(st.integers(1, 5))
    keep = draw(
        st.one_of(
            st.sampled_from(["always", "except_last", "never"]),
            st.integers(0, 6),
            st.lists(st.integers(0, 6), min_size=len(balance), max_size=len(balance)),
        )
    )
    rows = draw(st.integers(1, 7))
    return names, make, {"balance": balance, "chunks": chunks, "checkpoint": keep}, rows


common = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def batch(rows):
    return torch.linspace(-1, 1, rows * WIDTH, dtype=torch.float64).reshape(rows, WIDTH).sin()


@common
@given(pipelines(PARTS), st.booleans())
def test_as_the_whole_batch_within_rounding(pipeline, input_gradient):
    _, make, options, rows = pipeline
    results = []
    module, plain = make(), make()
    for run in (make_pipe(module, **options), plain):
        x = batch(rows).requires_grad_(input_gradient)
        y = run(x * 1)
        F.mse_loss(y, batch(rows) ** 2).backward()
        results.append({"output": y.detach(), "x": x.grad})
    found = results[0] | gradients(module)
    for name, expected in (results[1] | gradients(plain)).items():
        if expected is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-13)


@common
@given(pipelines(PARTS | DRAWING))
def test_as_the_plain_loop_to_the_bit(pipeline):
    _, make, options, rows = pipeline
    module, plain = make(), PlainLoop(make(), options["chunks"])
    pipe = make_pipe(module, **options)
    for _ in range(2):
        for run in (pipe, plain):
            F.mse_loss(run(batch(rows)), batch(rows) ** 2).backward()
        assert_same(gradients(module), gradients(plain.module))
