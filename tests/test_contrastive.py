"""The contrastive loss against a plain restatement, and its temperature."""

import math

import pytest
import torch

from gpipe.models.contrastive import ContrastiveLoss


def features(rows: int = 5, width: int = 4, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, rows, width, generator=generator, dtype=dtype)
    return images.requires_grad_(), texts.requires_grad_()


def restatement(images: torch.Tensor, texts: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Row by row, as in the paper's figure 3, without softmax or cross-entropy from torch."""
    rows = len(images)
    images = [row / row.pow(2).sum().sqrt() for row in images]
    texts = [row / row.pow(2).sum().sqrt() for row in texts]
    scores = [[logit_scale.exp() * (image * text).sum() for text in texts] for image in images]
    total = torch.zeros((), dtype=torch.float64)
    for i in range(rows):
        total = total - scores[i][i] + torch.stack(scores[i]).exp().sum().log()
        total = total - scores[i][i] + torch.stack([scores[j][i] for j in range(rows)]).exp().sum().log()
    return total / (2 * rows)


def test_value_and_gradients_equal_a_plain_restatement():
    loss = ContrastiveLoss().double()
    images, texts = features()
    scale = loss.logit_scale.detach().clone().requires_grad_()
    expected = restatement(images, texts, scale)
    wanted = torch.autograd.grad(expected, (images, texts, scale))
    value = loss((images, texts))
    found = torch.autograd.grad(value, (images, texts, loss.logit_scale))
    torch.testing.assert_close(value, expected)
    assert wanted[2].abs() > 1e-3
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_scale_starts_as_published():
    loss = ContrastiveLoss()
    assert [name for name, _ in loss.named_parameters()] == ["logit_scale"]
    assert loss.logit_scale.shape == ()
    assert loss.logit_scale.dtype == torch.float32
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_the_scale_is_clamped_from_both_sides_and_stays_the_same_parameter():
    loss = ContrastiveLoss()
    parameter = loss.logit_scale
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    for gradient, clamped in [(-50.0, math.log(100)), (50.0, 0.0), (-1.5, 1.5)]:
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        loss.clamp_()
        assert parameter.item() == pytest.approx(clamped)
    assert loss.logit_scale is parameter
    assert parameter.requires_grad


def test_matched_pairs_cost_less_than_mismatched_ones():
    images, _ = features()
    loss = ContrastiveLoss()
    assert loss((images, images)) < 0.1 < 1 < loss((images, images.roll(1, 0)))


def test_no_features_are_told_apart_at_the_start_of_equal_ones():
    ones = torch.ones(7, 3)
    assert ContrastiveLoss()((ones, ones)).item() == pytest.approx(math.log(7))


def test_the_length_of_a_feature_does_not_matter():
    images, texts = features()
    loss = ContrastiveLoss().double()
    torch.testing.assert_close(loss((images * 3, texts * 0.1)), loss((images, texts)))


def test_targets_are_taken_and_not_used():
    images, texts = features()
    loss = ContrastiveLoss()
    assert torch.equal(loss((images, texts), torch.arange(5)), loss((images, texts)))


def test_half_precision_features_are_compared_in_float32_under_autocast():
    images, texts = (tensor.detach().bfloat16().requires_grad_() for tensor in features(64, 32))
    loss = ContrastiveLoss()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss((images, texts))
    assert value.dtype == torch.float32
    expected = loss((images.float(), texts.float()))
    assert torch.equal(value, expected)
    value.backward()
    assert images.grad.dtype == torch.bfloat16
    assert loss.logit_scale.grad.dtype == torch.float32


def test_float32_features_under_autocast_are_not_rounded():
    images, texts = features(64, 32, torch.float32)
    loss = ContrastiveLoss()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss((images, texts))
    assert torch.equal(value, loss((images, texts)))


def test_the_meta_device_gives_a_shape():
    with torch.device("meta"):
        loss = ContrastiveLoss()
        assert loss((torch.empty(3, 4), torch.empty(3, 4))).shape == ()


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,)), ((0, 3), (0, 3))])
def test_features_that_are_no_pairs_are_refused(shapes):
    one, other = shapes
    message = rf"expected .* one shape \(B, E\).*given \({one[0]},.* and \({other[0]},.*pass the features"
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss()((torch.randn(one), torch.randn(other)))
