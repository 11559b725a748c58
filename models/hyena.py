"""Hyena: long convolutions with implicit filters, and gates (Poli et al. 2023, arXiv 2302.10866), of order 2."""

import math
from typing import cast

import torch
from torch import Tensor, nn

SHORT, BANDS, HIDDEN = 3, 8, 64  # taps of the short filter; frequencies of the positions, features inside (long filter)
FREQUENCY = 10.0  # of the sines in the long filter's network, at first
TARGET, SLOWEST, FASTEST = 0.01, 1.5, 0.3  # a filter's window falls to TARGET after so many context lengths


class Hyena(nn.Module):
    """A causal token mixer whose time grows as T log T with the length T of a text.

    Three projections of the tokens, each smoothed by a short causal filter: the value, times the first gate, is
    convolved with a filter as long as the text, and multiplied by the second gate.

    Args:
        width: W, features per token.
        context_length: most tokens of a text.
    """

    def __init__(self, width: int, context_length: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(width, 3 * width)
        self.short_filter = nn.Conv1d(3 * width, 3 * width, SHORT, padding=SHORT - 1, groups=3 * width)
        self.long_filter = LongFilter(width, context_length)
        self.skip = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj.weight, std=width**-0.5)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of each row.

        Args:
            x: (B, T, W).
            mask: (B, T) bool, true at tokens and false at padding, which reaches no token; None: no padding.

        Returns:
            (B, T, W); at padding it means nothing.
        """
        length = x.shape[1]
        padding = None if mask is None else ~mask[:, None]  # (B, 1, T)
        projected = _blank(self.in_proj(x).transpose(1, 2), padding)  # (B, 3 W, T)
        smooth = self.short_filter(projected)[..., :length]
        outer, inner, value = smooth.chunk(3, dim=1)  # each (B, W, T)
        gated = _blank(inner * value, padding)
        y = convolve(gated, self.long_filter(length)) + self.skip[:, None] * gated
        return cast(Tensor, self.out_proj((outer * y).transpose(1, 2)))  # (B, T, W)


class LongFilter(nn.Module):
    """W filters of any length up to the context's, given by a small network of the position, under decaying windows.

    Args:
        width: W, number of filters.
        context_length: longest filter.
    """

    def __init__(self, width: int, context_length: int) -> None:
        super().__init__()
        self.width = width
        self.context_length = context_length
        self.first = nn.Linear(1 + 2 * BANDS, HIDDEN)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, width, bias=False)
        self.frequency = nn.Parameter(torch.full((HIDDEN,), FREQUENCY))
        # The squares of a window add up to context / (2 rate), those of the sines to HIDDEN / 2: so the filtered text
        # is as large as the text.
        nn.init.normal_(self.last.weight, std=2 * (HIDDEN * context_length) ** -0.5)
        with torch.no_grad():
            self.last.weight.mul_(self._rates(self.last.weight.device).sqrt()[:, None])

    def forward(self, length: int) -> Tensor:
        """The first ``length`` values of each filter: (W, length)."""
        time = torch.arange(length, device=self.frequency.device)[:, None] / self.context_length  # (T, 1)
        angles = 2 * math.pi * time * torch.arange(1, BANDS + 1, device=time.device)  # (T, bands)
        x = torch.cat([time, angles.sin(), angles.cos()], dim=1).to(self.frequency.dtype)  # (T, 1 + 2 bands)
        x = torch.sin(self.frequency * self.first(x))
        x = torch.sin(self.frequency * self.second(x))
        window = torch.exp(-time * self._rates(time.device))  # (T, W)
        filters: Tensor = self.last(x) * window.to(x.dtype)  # (T, W)
        return filters.T

    def _rates(self, device: torch.device) -> Tensor:
        """How fast each filter's window falls, per context length: (W,)."""
        fall = -math.log(TARGET)
        return torch.linspace(fall / SLOWEST, fall / FASTEST, self.width, device=device)


def convolve(x: Tensor, filters: Tensor) -> Tensor:
    """Causal convolution by the Fourier transform, in float32 or wider.

    Args:
        x: (B, W, T).
        filters: (W, T), one for each feature.

    Returns:
        (B, W, T) of the dtype of ``x``: at t the sum over s from 0 to t of ``filters[:, s] * x[..., t - s]``.
    """
    length = x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    size = 2 * length  # so that what runs out at the end does not come back at the start
    spectrum = torch.fft.rfft(x.to(wide), n=size) * torch.fft.rfft(filters.to(wide), n=size)
    whole: Tensor = torch.fft.irfft(spectrum, n=size)  # (B, W, 2 T)
    return whole[..., :length].to(x.dtype)


def _blank(x: Tensor, padding: Tensor | None) -> Tensor:
    return x if padding is None else x.masked_fill(padding, 0.0)
