"""Losses over all pairs in chunks: equal to the matrix of all pairs, without its memory. And SigLIP's loss."""

import gc
import math
import re

import pytest
import torch
from nets import make_pipe
from test_clip import batch as clip_batch
from test_clip import loud, small
from test_contrastive import features

from gpipe.models.contrastive import ContrastiveLoss, SigmoidLoss
from gpipe.partitioning.live import LiveBytes

LOSSES = [ContrastiveLoss, SigmoidLoss]
every_loss = pytest.mark.parametrize("kind", LOSSES)


def value_and_gradients(loss, images, texts, factor=1.0):
    value = loss((images, texts))
    return value, *torch.autograd.grad(factor * value, (images, texts, *loss.parameters()))


def pairwise(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss pair by pair, as in the paper's equation 1."""
    total = torch.zeros((), dtype=images.dtype)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            cosine = (image * text).sum() / (image.norm() * text.norm())
            label = 1 if i == j else -1
            total = total - (1 / (1 + (-label * (scale.exp() * cosine + bias)).exp())).log()
    return total / len(images)


def test_sigmoid_loss_equals_a_plain_restatement():
    loss = SigmoidLoss().double()
    images, texts = features(7)
    scale, bias = (p.detach().clone().requires_grad_() for p in loss.parameters())
    expected = pairwise(images, texts, scale, bias)
    wanted = torch.autograd.grad(expected, (images, texts, scale, bias))
    found = value_and_gradients(loss, images, texts)
    torch.testing.assert_close(found, (expected, *wanted))
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


def test_scale_and_bias_start_as_published():
    loss = SigmoidLoss()
    assert {name: tuple(p.shape) for name, p in loss.named_parameters()} == {"logit_scale": (), "logit_bias": ()}
    assert loss.logit_scale.item() == pytest.approx(math.log(10))
    assert loss.logit_bias.item() == -10
    assert {p.dtype for p in loss.parameters()} == {torch.float32}


def test_the_temperature_at_the_start_can_be_chosen():
    assert ContrastiveLoss(inverse_temperature=100).logit_scale.item() == pytest.approx(math.log(100))
    for wrong in (0.5, 101, math.nan):
        with pytest.raises(ValueError, match=f"inverse_temperature to be from 1 to 100, given {wrong}"):
            ContrastiveLoss(inverse_temperature=wrong)


@every_loss
@pytest.mark.parametrize("chunk", [1, 3, 10, 36, 37])
def test_chunks_give_the_value_and_gradients_of_the_matrix(kind, chunk):
    images, texts = features(37, 6)
    expected = value_and_gradients(kind(chunk=1000).double(), images, texts, factor=3.0)
    torch.testing.assert_close(value_and_gradients(kind(chunk=chunk).double(), images, texts, factor=3.0), expected)


@every_loss
def test_chunks_are_exact_to_rounding_in_float32(kind):
    images, texts = features(300, 16, torch.float32)
    exact = value_and_gradients(kind(chunk=1000).double(), images.double(), texts.double())
    found = value_and_gradients(kind(chunk=64), images, texts)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


@every_loss
def test_gradients_by_differences(kind):
    images, texts = features(5, 3)
    loss = kind(chunk=2).double()
    assert torch.autograd.gradcheck(lambda *inputs: loss(inputs), (images, texts))


@every_loss
def test_only_what_is_asked_for_is_given(kind):
    images, texts = features(5)
    loss = kind(chunk=2).double().requires_grad_(False)
    loss((images.detach(), texts)).backward()
    assert texts.grad is not None
    assert images.grad is None


@every_loss
def test_extreme_logits_stay_finite(kind):
    images = torch.eye(4).requires_grad_()
    for texts in (torch.eye(4), torch.eye(4).roll(1, 0)):
        loss = kind(chunk=2)
        with torch.no_grad():
            loss.logit_scale.fill_(math.log(100))
        found = value_and_gradients(loss, images, texts.requires_grad_())
        assert all(part.isfinite().all() for part in found)


@every_loss
def test_half_precision_features_are_compared_in_float32_under_autocast(kind):
    images, texts = (tensor.detach().bfloat16().requires_grad_() for tensor in features(64, 32))
    loss = kind(chunk=16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss((images, texts))
        found = torch.autograd.grad(value, (images, *loss.parameters()))
    expected = torch.autograd.grad(loss((images.float(), texts.float())), (images, *loss.parameters()))
    assert value.dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# Memory


def peak(loss, images, texts):
    """Bytes that operators held at once, forward and backward."""
    gc.collect()
    with LiveBytes() as held:
        loss((images, texts)).backward()
    return held.peak


@every_loss
def test_a_chunk_is_held_at_a_time(kind):
    rows, width, chunk = 1024, 8, 64
    matrix = rows * rows * 4
    images, texts = (tensor.detach().requires_grad_() for tensor in features(rows, width, torch.float32))
    assert peak(kind(chunk=rows), images, texts) > matrix
    lean = peak(kind(chunk=chunk), images, texts)
    assert lean < 4 * chunk * rows * 4 + 12 * images.nbytes < matrix / 2


@every_loss
def test_the_published_mini_batch_needs_no_4_gib(kind):
    """32,768 pairs of 512 features, by default: on the meta device, which allocates nothing and is counted alike."""
    with torch.device("meta"):
        loss = kind()
        images, texts = (torch.empty(32768, 512, requires_grad=True) for _ in range(2))
    assert peak(loss, images, texts) < 640 * 2**20
    assert images.grad.shape == texts.grad.shape == (32768, 512)


# As any loss


@every_loss
def test_a_few_steps_lower_the_loss(kind):
    model, loss = small(), kind(chunk=2)
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=3e-3)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(model(clip_batch(5)))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2


@every_loss
def test_every_partition_gives_the_same_bits(kind):
    found = []
    for balance in ([9], [4, 5], [2, 3, 4]):
        model, loss = loud(small(dropout=0.3)), kind(chunk=2)
        value = make_pipe(model, balance, 2).train_step(clip_batch(5), None, loss)
        found.append([value, *(p.grad for p in [*model.parameters(), *loss.parameters()])])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(others, found[0], strict=True))


@every_loss
def test_what_is_refused(kind):
    with pytest.raises(ValueError, match="chunk to be a whole number of at least 1, given 0"):
        kind(chunk=0)
    message = re.escape(f"{kind.__name__}: expected image and text features of one shape (B, E) with at least one row")
    for shapes in (((4, 3), (5, 3)), ((0, 3), (0, 3)), ((4,), (4,))):
        with pytest.raises(ValueError, match=message):
            kind()(tuple(map(torch.randn, shapes)))
