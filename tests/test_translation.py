"""The translation model: what a token knows of both texts, padding, depth, wrong input."""

import pytest
import torch
from nets import loud

from gpipe.models.next_token import NextTokenLoss
from gpipe.models.translation import translation

SMALL = {
    "layers": 2,
    "feed_forward": 12,
    "heads": 2,
    "width": 8,
    "head_width": 3,
    "vocabulary_size": 11,
    "context_length": 7,
    "dropout": 0.0,
}


def small(**settings):
    torch.manual_seed(1)
    return loud(translation(**SMALL | settings).double())


def texts(rows=3, source=5, target=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(11, (rows, source), generator=generator), torch.randint(
        11, (rows, target), generator=generator
    )


def test_cells_in_order():
    names = [name for name, _ in small().named_children()]
    assert names == ["source", "encoder0", "encoder1", "target", "decoder0", "decoder1", "head"]


def test_a_target_token_knows_the_source_and_the_target_before_it():
    model, (source, target) = small(), texts()
    before = model(((source, None), (target, None)))
    assert before.shape == (3, 4, 11)
    for place in range(4):
        changed = target.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model(((source, None), (changed, None)))
        assert torch.equal(after[:, :place], before[:, :place])
        assert (after[:, place:] - before[:, place:]).abs().amax((0, 2)).min() > 1e-4
    for place in range(5):
        changed = source.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = model(((changed, None), (target, None)))
        assert (after - before).abs().amax((0, 2)).min() > 1e-4


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_of_either_text_changes_nothing(side):
    model, (source, target) = small(), texts()
    lengths = [(5, 1), (1, 4), (3, 2)]

    def padded(tokens, lengths):
        whole, mask = torch.full((3, 7), 9), torch.zeros(3, 7, dtype=torch.bool)
        for row, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(7 - length, 7)
            whole[row, place], mask[row, place] = tokens[row, :length], True
        return whole, mask

    first, second = padded(source, [s for s, _ in lengths]), padded(target, [t for _, t in lengths])
    logits = model((first, second))
    for row, (s, t) in enumerate(lengths):
        alone = model(((source[row : row + 1, :s], None), (target[row : row + 1, :t], None)))[0]
        torch.testing.assert_close(logits[row][second[1][row]], alone, rtol=1e-10, atol=1e-10)


def deep(shrunken):
    """64 layers in each stack, with our start values or with those of branches that do not shrink with depth."""
    torch.manual_seed(1)
    model = translation(**SMALL | {"layers": 64})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out_proj.weight", "c_proj.weight")) and not shrunken:
                parameter.mul_((64 * (2 if "encoder" in name else 3)) ** 0.5)
    return model


def spreads(model):
    """How much larger the largest gradient of a layer is than the smallest: in the encoder and in the decoder."""
    source, target = texts(4, 7, 7)
    NextTokenLoss()(model(((source, None), (target, None))), target.roll(-1, 1)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    found = []
    for stack in ("encoder", "decoder"):
        layers = [cell for name, cell in model.named_children() if name.startswith(stack)]
        norms = [torch.stack([p.grad.norm() for p in layer.parameters()]).norm().item() for layer in layers]
        assert len(norms) == 64
        found.append(max(norms) / min(norms))
    return found


def test_start_values_that_shrink_with_depth_give_128_layers_gradients_of_one_size():
    ours, plain = spreads(deep(shrunken=True)), spreads(deep(shrunken=False))
    assert max(ours) < 2.2, ours
    assert all(other > 1.5 * one for one, other in zip(ours, plain, strict=True)), (ours, plain)
    assert max(plain) > 8, plain


def test_128_layers_learn():
    model, (source, target), loss = deep(shrunken=True), texts(4, 5, 5), NextTokenLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        value = loss(model(((source, None), (target, None))), source)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers to be a whole number of at least 1, given 0"),
        ({"head_width": 0}, "head_width .* given 0"),
        ({"heads": 1.5}, r"heads .* given 1\.5"),
        ({"dropout": -0.1}, r"dropout .* given -0\.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize("which", ["source", "target"])
def test_texts_the_model_cannot_read_are_refused_by_the_first_cell(which):
    good, stem = (texts()[0], None), small()[0]

    def given(tokens, mask=None):
        bad = tokens, mask
        return stem((bad, good) if which == "source" else (good, bad))

    with pytest.raises(ValueError, match=f"translation, {which}: expected token ids from 0 to 10 .* from 12 to 12"):
        given(torch.full((3, 4), 12))
    with pytest.raises(ValueError, match=f"translation, {which}: expected at most context_length=7 .* given 8"):
        given(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"translation, {which}: expected a mask of shape \(3, 4\)"):
        given(torch.zeros(3, 4, dtype=torch.int64), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="as many sources as targets, given"):
        given(torch.zeros(2, 4, dtype=torch.int64))


def test_an_empty_source_is_refused():
    source, target = texts()
    mask = torch.ones_like(source, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"translation, source: expected at least one token .* none in row 1; leave"):
        small()(((source, mask), (target, None)))
