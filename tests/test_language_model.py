"""The language model: what a token knows of the others, padding, wrong input."""

import math

import pytest
import torch
from nets import loud

from gpipe.models.language_model import LanguageStem, language_model
from gpipe.models.token_embedding import TokenEmbedding, sinusoids

SMALL = {"vocabulary_size": 11, "width": 8, "layers": 2, "heads": 2, "context_length": 7}
every_mixer = pytest.mark.parametrize("mixer", ["attention", "hyena"])


def small(**settings):
    torch.manual_seed(1)
    return loud(language_model(**SMALL | settings).double())


def tokens_of(rows=3, length=6):
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(2))


@every_mixer
def test_cells_and_what_passes_their_boundaries(mixer):
    model = small(mixer=mixer)
    assert [name for name, _ in model.named_children()] == ["stem", "layer0", "layer1", "head"]
    for inputs in (tokens_of(), (tokens_of(), torch.ones(3, 6, dtype=torch.bool))):
        boundary = inputs
        for cell in list(model)[:-1]:
            boundary = cell(boundary)
            assert boundary[0].shape == (3, 6, 8)
            assert boundary[1] is (None if isinstance(inputs, torch.Tensor) else inputs[1])
        assert model[-1](boundary).shape == (3, 6, 11)


@pytest.mark.parametrize("with_mask", [False, True])
@every_mixer
def test_a_later_token_leaves_what_came_before_as_it_was(mixer, with_mask):
    model = small(mixer=mixer)
    tokens = tokens_of()
    mask = torch.ones_like(tokens, dtype=torch.bool) if with_mask else None
    before = model((tokens, mask))
    for place in range(6):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model((changed, mask))
        if mixer == "attention":
            assert torch.equal(after[:, :place], before[:, :place])
        else:  # a Fourier transform sees all of the text, and rounds
            torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-12, atol=1e-12)
        assert (after[:, place:] - before[:, place:]).abs().amax((0, 2)).min() > 1e-4


@every_mixer
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(mixer, side):
    model, tokens = small(mixer=mixer), tokens_of()
    lengths = (6, 1, 4)
    padded, mask = torch.full((3, 7), 9), torch.zeros(3, 7, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(7 - length, 7)
        padded[row, place], mask[row, place] = tokens[row, :length], True
    logits = model((padded, mask))
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(logits[row][mask[row]], alone, rtol=1e-10, atol=1e-10)


@every_mixer
def test_a_mask_without_padding_is_no_mask(mixer):
    model, tokens = small(mixer=mixer), tokens_of()
    torch.testing.assert_close(model((tokens, torch.ones_like(tokens, dtype=torch.bool))), model(tokens))


@every_mixer
def test_a_row_of_padding_alone_stays_finite(mixer):
    model, tokens = small(mixer=mixer), tokens_of()
    mask = torch.tensor([[True] * 6, [False] * 6, [True] * 6])
    logits = model((tokens, mask))
    logits[mask].sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_mixer
def test_order_matters(mixer):
    model = small(mixer=mixer, layers=1)
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert (one[0, -1] - other[0, -1]).abs().max() > 1e-3


def test_positions_are_sines_of_a_scale_of_wavelengths():
    found = sinusoids(torch.tensor([0, 1, 5]), 6).double()
    rates = [1, 10_000**-0.5, 10_000**-1.0]
    expected = [[f(p * r) for f in (math.sin, math.cos) for r in rates] for p in (0, 1, 5)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert sinusoids(torch.arange(3), 5).shape == (3, 5)
    assert sinusoids(torch.arange(3), 1).shape == (3, 1)


@torch.no_grad()
def test_features_start_near_one_and_scores_near_chance():
    torch.manual_seed(0)
    model = language_model(vocabulary_size=500, width=64, layers=12, heads=4, context_length=64)
    tokens = torch.randint(500, (4, 64))
    x = model[0](tokens)
    assert x[0].std() == pytest.approx(1.5**0.5, rel=0.1)  # of the embedding, and of sine or cosine
    for cell in list(model)[1:-1]:
        x = cell(x)
    assert 1 < x[0].std() < 2
    loss = torch.nn.functional.cross_entropy(model[-1](x).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert abs(loss.item() - math.log(500)) < 1


def test_no_rows_give_no_scores():
    assert small()(torch.zeros(0, 6, dtype=torch.int64)).shape == (0, 6, 11)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "width to be a multiple of heads, given width=8 and heads=3; set width to 6 or 9"),
        ({"layers": 0}, "layers to be a whole number of at least 1, given 0"),
        ({"width": "8"}, "width .* given '8'"),
        ({"vocabulary_size": 0}, "vocabulary_size .* given 0"),
        ({"context_length": -1}, "context_length .* given -1"),
        ({"feed_forward": 0}, "feed_forward .* given 0"),
        ({"mixer": "rnn"}, "mixer to be one of 'attention', 'hyena', given 'rnn'"),
        ({"dropout": 1.0}, r"dropout to be a number of at least 0 and below 1, given 1\.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        language_model(**SMALL | settings)


def test_hyena_has_no_heads_to_divide_the_width():
    assert language_model(**SMALL | {"mixer": "hyena", "heads": 3})(tokens_of()).shape == (3, 6, 11)


LONG = torch.int64
BAD = [
    (torch.zeros(3, 8, dtype=LONG), None, "context_length=7 tokens a text, given 8; shorten"),
    (torch.zeros(3, dtype=LONG), None, r"tokens of shape \(B, T\), given \(3,\)"),
    (torch.zeros(3, 4), None, r"torch\.int64, given torch\.float32; convert them with \.long"),
    (torch.full((3, 4), 11), None, r"ids from 0 to 10 \(vocabulary_size=11\), given ids from 11 to 11; use"),
    (torch.full((3, 4), -1), None, "given ids from -1 to -1"),
    (torch.zeros(3, 4, dtype=LONG), torch.ones(3, 5, dtype=torch.bool), r"mask of shape \(3, 4\).* given \(3, 5\)"),
    (torch.zeros(3, 4, dtype=LONG), torch.ones(3, 4), r"dtype torch\.bool, given \(3, 4\) and torch\.float32; pass"),
]


@pytest.mark.parametrize(("tokens", "mask", "message"), BAD)
def test_texts_the_model_cannot_read_are_refused_by_the_first_cell(tokens, mask, message):
    with pytest.raises(ValueError, match=f"language model: expected .*{message}"):
        small()[0]((tokens, mask))


@every_mixer
def test_the_meta_device_gives_shapes_without_looking_at_values(mixer):
    with torch.device("meta"):
        model = language_model(**SMALL | {"mixer": mixer})
        tokens = torch.empty(3, 6, dtype=torch.int64)
        assert model((tokens, torch.empty(3, 6, dtype=torch.bool))).shape == (3, 6, 11)


def test_a_single_cell_can_be_built_by_hand():
    stem = LanguageStem(TokenEmbedding(11, 8, 0.0), context_length=7)
    assert stem(tokens_of())[0].shape == (3, 6, 8)
