"""The Transformers under a pipeline, and their costs: what holds for the language model and the translation alike."""

import functools

import pytest
import torch
from nets import gradients, loud
from torch import nn
from worlds import World

from gpipe import DistributedGPipe, GPipe
from gpipe.models import transformer
from gpipe.models.attention import Attention
from gpipe.models.transformer import NextTokenLoss, gpipe_table1, language_model, translation
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.ranks.slicing import initialised

LANGUAGE = {"vocabulary_size": 11, "width": 8, "layers": 2, "heads": 2, "context_length": 7}
TRANSLATION = {
    "layers": 1,
    "feed_forward": 12,
    "heads": 2,
    "width": 8,
    "head_width": 3,
    "vocabulary_size": 11,
    "context_length": 7,
}


def masked(generator, rows, length):
    """Tokens and a mask of texts of different lengths, none empty."""
    tokens = torch.randint(11, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    return tokens, torch.arange(length) < lengths


def inputs_of(kind, rows=5):
    generator = torch.Generator().manual_seed(2)
    if kind == "translation":
        return masked(generator, rows, 7), masked(generator, rows, 6)
    return masked(generator, rows, 6)


def make(kind, **settings):
    torch.manual_seed(1)
    if kind == "translation":
        return translation(**TRANSLATION | settings)
    return language_model(**LANGUAGE | {"mixer": kind} | settings)


def targets_of(inputs):
    """Some token to predict wherever there is one."""
    tokens, mask = inputs[1] if isinstance(inputs[0], tuple) else inputs
    return torch.where(mask, (tokens + 3) % 11, -100)


def balances(model):
    """Two stages, three, and one per cell."""
    cells = len(cells_of(model))
    return [[cells // 2, cells - cells // 2], [1, cells - 2, 1], [1] * cells]


every_kind = pytest.mark.parametrize("kind", ["attention", "hyena", "translation"])
tied_or_not = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def test_the_door_shows_the_models():
    assert sorted(transformer.__all__) == transformer.__all__
    assert all(hasattr(transformer, name) for name in transformer.__all__)


# Parameters


@pytest.mark.parametrize(
    ("layers", "printed"), [(3, "282.2"), (13, "785.8"), (103, "5.3e3"), (415, "21.0e3"), (1663, "83.9e3")]
)
def test_the_parameters_of_gpipes_table_1(layers, printed):
    with torch.device("meta"):
        model = gpipe_table1(layers)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert (f"{millions:.1f}" if millions < 1000 else f"{millions / 1000:.1f}e3") == printed
    blocks = [cell.block for cell in model if hasattr(cell, "block")]
    assert len(blocks) == layers
    assert all(block.mixer.heads == 32 and block.mixer.causal for block in blocks[:3])


@pytest.mark.parametrize(
    ("size", "thousand_millions"),
    [((24, 8192, 16), 1.3), ((12, 16384, 32), 1.3), ((32, 16384, 32), 3), ((64, 16384, 32), 6)],
)
def test_the_parameters_of_gpipes_translation_models(size, thousand_millions):
    layers, feed_forward, heads = size
    with torch.device("meta"):
        model = translation(layers=layers, feed_forward=feed_forward, heads=heads)
    digits = 1 if thousand_millions < 2 else 0
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, digits) == thousand_millions


@every_kind
def test_tying_shares_the_embedding(kind):
    tied, untied = make(kind, tied=True), make(kind)
    copies = 2 if kind == "translation" else 1
    counts = [sum(p.numel() for p in model.parameters()) for model in (untied, tied)]
    assert counts[0] - counts[1] == copies * 11 * 8
    assert list(tied.state_dict()) == list(untied.state_dict())
    tables = [p for name, p in tied.named_parameters(remove_duplicate=False) if p.shape == (11, 8)]
    assert len(tables) == 1 + copies
    assert len({id(table) for table in tables}) == 1


@every_kind
def test_there_is_no_state_but_parameters(kind):
    assert not list(make(kind).buffers())


@every_kind
def test_every_parameter_gets_a_gradient(kind):
    model, inputs = loud(make(kind)), inputs_of(kind)
    NextTokenLoss()(model(inputs), targets_of(inputs)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_kind
def test_the_same_seed_gives_the_same_model(kind):
    one, other = make(kind).state_dict(), make(kind).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


@every_kind
def test_a_few_steps_lower_the_loss(kind):
    model, inputs, loss = make(kind), inputs_of(kind), NextTokenLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    values = []
    for _ in range(25):
        optimizer.zero_grad()
        value = loss(model(inputs), targets_of(inputs))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 3


# Under a pipeline


@tied_or_not
@every_kind
@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_pipelined_outputs_and_gradients_are_those_of_the_model(kind, tied, loss_over):
    model, inputs = loud(make(kind, tied=tied, dropout=0.0).double()), inputs_of(kind)
    targets, loss = targets_of(inputs), NextTokenLoss()
    outputs = model(inputs)
    value = loss(outputs, targets)
    value.backward()
    expected = gradients(model)
    for balance in balances(model):
        model.zero_grad(set_to_none=True)
        pipe = GPipe(model, balance=balance, devices=["cpu"] * len(balance), chunks=3)
        torch.testing.assert_close(pipe(inputs), outputs, rtol=1e-11, atol=1e-11)
        found = pipe.train_step(inputs, targets, loss, loss_over)
        torch.testing.assert_close(found, value, rtol=1e-11, atol=1e-11)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-11, msg=name)


def trained(kind, tied, balance, checkpoint):
    model, inputs = loud(make(kind, tied=tied, dropout=0.3)), inputs_of(kind)
    pipe = GPipe(model, balance=balance, devices=["cpu"] * len(balance), chunks=3, checkpoint=checkpoint, seed=5)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        pipe.train_step(inputs, targets_of(inputs), NextTokenLoss(), "micro_batch")
        optimizer.step()
    return model.state_dict()


@tied_or_not
@every_kind
def test_every_partition_trains_to_the_same_bits_with_dropout(kind, tied):
    model = make(kind)
    expected = trained(kind, tied, [len(model)], "never")
    assert not all(torch.equal(value, loud(make(kind, tied=tied)).state_dict()[key]) for key, value in expected.items())
    for balance in balances(model):
        for checkpoint in ("always", "except_last", "never"):
            found = trained(kind, tied, balance, checkpoint)
            assert all(torch.equal(found[key], value) for key, value in expected.items()), (balance, checkpoint)


def train_rank(rank, kind):
    factory = functools.partial(make, kind, tied=True, dropout=0.3)
    cells = len(factory())
    pipe = DistributedGPipe(factory, [cells // 2, cells - cells // 2], chunks=3, loss_fn=NextTokenLoss(), seed=5)
    steps(pipe, functools.partial(pipe.train_step, inputs_of(kind), targets_of(inputs_of(kind))))
    return dict(pipe.state_dict())


def steps(pipe, step):
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        step()
        optimizer.step()


@pytest.fixture
def two():
    world = World(2)
    yield world
    world.close()


def test_ranks_that_make_their_own_cells_train_to_the_bits_of_threads(two):
    for kind in ("attention", "hyena", "translation"):
        one, other = two.values(train_rank, kind)
        model = initialised(functools.partial(make, kind, tied=True, dropout=0.3), 5)
        cells = len(model)
        pipe = GPipe(model, balance=[cells // 2, cells - cells // 2], devices=["cpu"] * 2, chunks=3, seed=5)
        loss = NextTokenLoss()
        steps(pipe, functools.partial(pipe.train_step, inputs_of(kind), targets_of(inputs_of(kind)), loss))
        assert (one | other).keys() == model.state_dict().keys()
        assert all(torch.equal((one | other)[key], value) for key, value in model.state_dict().items()), kind


@every_kind
def test_dropout_draws_in_training_only(kind):
    model, inputs = loud(make(kind, dropout=0.5)), inputs_of(kind)
    assert not torch.allclose(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))
    assert torch.equal(model(inputs), loud(make(kind, dropout=0.0))(inputs))


# Costs


@every_kind
def test_every_cell_profiles_and_estimates(kind):
    model, inputs = make(kind, dropout=0.1), inputs_of(kind)
    measured = profile(model, inputs, chunks=2, repeats=1)
    with torch.device("meta"):
        shapes = make(kind, dropout=0.1)
    estimated = estimate(shapes, inputs, speed=Speed(flops=1e9, bytes=1e9), chunks=2)
    for costs in (measured, estimated):
        assert [cost.name for cost in costs] == [name for name, _ in cells_of(model)]
        assert all(isinstance(cost, CellCost) and cost.forward_seconds > 0 for cost in costs)
    rows = 3
    features = {"translation": rows * (7 * 8 * 4 + 6 * 8 * 4 + 7 + 6)}.get(kind, rows * (6 * 8 * 4 + 6))
    assert measured[-2].boundary_bytes == estimated[-2].boundary_bytes == features


def test_hyena_is_cheaper_than_the_square_of_the_length():
    def operations(mixer, length):
        with torch.device("meta"):
            model = language_model(**LANGUAGE | {"mixer": mixer, "context_length": 4096})
            tokens = torch.zeros(1, length, dtype=torch.int64)
        cost = estimate(model, tokens, speed=Speed(flops=1.0, bytes=float("inf")))[1]
        return cost.forward_seconds

    # Fourier transforms, which are T log T, are not counted; any product over T by T would be.
    assert operations("hyena", 4096) == pytest.approx(2 * operations("hyena", 2048), rel=1e-4)
    assert operations("attention", 4096) > 3.5 * operations("attention", 2048)


# Numeric types


@every_kind
def test_bfloat16_autocast_is_near_float32_and_trains(kind):
    model, inputs, loss = make(kind, dropout=0.0), inputs_of(kind), NextTokenLoss()
    expected = model(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
        value = loss(outputs, targets_of(inputs))
        value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(outputs.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert make(kind).bfloat16()(inputs).dtype == torch.bfloat16


# What attention takes


def test_attention_with_heads_of_any_width_is_that_of_torch():
    torch.manual_seed(0)
    attention = loud(Attention(8, 2, head_width=3).double())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    query, key, value = (nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    heads = []
    for head in (slice(0, 3), slice(3, 6)):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / 3**0.5
        heads.append(scores.softmax(-1) @ value[..., head])
    torch.testing.assert_close(attention(x), attention.out_proj(torch.cat(heads, -1)))
