"""Hyena: the convolution against its definition, its filters, causality to rounding."""

import math

import pytest
import torch
from nets import loud

from gpipe.models.hyena import Hyena, LongFilter, convolve


def direct(x, filters):
    """The definition: a sum over all earlier places."""
    y = torch.zeros_like(x)
    for t in range(x.shape[-1]):
        for s in range(t + 1):
            y[..., t] += filters[:, s] * x[..., t - s]
    return y


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_the_convolution_is_the_sum_over_all_earlier_places(length):
    x, filters = torch.randn(3, 4, length, dtype=torch.float64), torch.randn(4, length, dtype=torch.float64)
    torch.testing.assert_close(convolve(x, filters), direct(x, filters), rtol=1e-12, atol=1e-12)


def test_the_convolution_is_computed_in_float32_at_least():
    x, filters = torch.randn(2, 4, 9).bfloat16(), torch.randn(4, 9).bfloat16()
    found = convolve(x, filters)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, direct(x.float(), filters.float()).bfloat16())


def test_a_shorter_filter_is_the_start_of_a_longer_one():
    filters = loud(LongFilter(6, 40).double())
    torch.testing.assert_close(filters(40)[:, :9], filters(9), rtol=1e-12, atol=1e-12)


def test_filters_start_with_windows_that_fall_at_different_rates():
    torch.manual_seed(0)
    filters = torch.stack([LongFilter(64, 256)(256).detach() for _ in range(20)])  # (20, W, T)
    energy = filters.square().mean(0)
    assert energy.sum(1).mean() == pytest.approx(1, rel=0.3)
    late = energy[:, 128:].sum(1) / energy.sum(1)
    assert late[:8].mean() > 10 * late[-8:].mean()
    window = math.exp(-2 * math.log(100) / 1.5 / 2)  # squared, at the middle of the context, of the slowest
    assert late[:8].mean() == pytest.approx(window, rel=0.7)


def test_hyena_is_what_the_paper_says():
    """Order 2: the value, times a gate, convolved, times a gate."""
    mixer = loud(Hyena(5, 16).double())
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    projected = mixer.in_proj(x)  # (B, T, 3 W)
    smooth = torch.zeros_like(projected) + mixer.short_filter.bias
    for tap in range(3):
        moved = torch.zeros_like(projected)
        moved[:, 2 - tap :] = projected[:, : 9 - (2 - tap)]
        smooth = smooth + moved * mixer.short_filter.weight[:, 0, tap]
    outer, inner, value = (part.transpose(1, 2) for part in smooth.split(5, dim=2))
    y = direct(inner * value, mixer.long_filter(9)) + mixer.skip[:, None] * inner * value
    torch.testing.assert_close(mixer(x), mixer.out_proj((outer * y).transpose(1, 2)))


def test_a_later_token_changes_earlier_outputs_by_rounding_at_most():
    mixer = loud(Hyena(6, 32).double())
    x = torch.randn(2, 32, 6, dtype=torch.float64)
    before = mixer(x)
    for place in range(32):
        changed = x.clone()
        changed[:, place] += 1
        after = mixer(changed)
        scale = before.abs().max()
        assert (after - before)[:, :place].abs().sum() <= 1e-12 * scale
        assert (after - before)[:, place:].abs().amax((0, 2)).min() > 1e-6


def test_the_first_token_reaches_the_last():
    mixer = loud(Hyena(6, 64).double())
    x = torch.randn(1, 64, 6, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, -1].sum().backward()
    assert (x.grad.abs().amax(-1) > 0).all()
