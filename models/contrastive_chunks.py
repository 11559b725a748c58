"""Losses over all pairs of a huge mini-batch, without the matrix of all pairs.

Logits are computed for a chunk of n images at a time and let go again; backward computes them anew. So B pairs take
some n x B numbers at a time instead of B x B. Sums over images are added up chunk by chunk: values and gradients are
those of the whole matrix up to rounding, and their last bits depend on n.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024
"""n, images whose logits are held at a time: 128 MiB of float32 for 32,768 pairs."""


def softmax_loss(images: Tensor, texts: Tensor, scale: Tensor, chunk: int = CHUNK) -> Tensor:
    """Symmetric cross-entropy over the logits ``scale * images @ texts.T``, whose diagonal is the target.

    Args:
        images: (B, E), of length 1.
        texts: (B, E), of length 1.
        scale: 0-dimensional.
        chunk: n.

    Returns:
        the mean over images and texts, 0-dimensional.
    """
    return cast(Tensor, _Softmax.apply(images, texts, scale, chunk))


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, chunk: int = CHUNK) -> Tensor:
    """Binary cross-entropy of every pair under the logits ``scale * images @ texts.T + bias``.

    Args:
        images: (B, E), of length 1.
        texts: (B, E), of length 1.
        scale: 0-dimensional.
        bias: 0-dimensional.
        chunk: n.

    Returns:
        the sum over all pairs, divided by B; 0-dimensional.
    """
    return cast(Tensor, _Sigmoid.apply(images, texts, scale, bias, chunk))


class _Softmax(torch.autograd.Function):
    """Saves the logarithms of the softmax's 2 B denominators, from which any chunk of it can be had again."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> Tensor:
        over_texts = images.new_empty(len(images))  # (B,)
        over_images = images.new_full((len(texts),), -torch.inf)  # (B,)
        for rows, logits in _chunks(images, texts, scale, chunk):
            over_texts[rows] = logits.logsumexp(dim=1)
            over_images = torch.logaddexp(over_images, logits.logsumexp(dim=0))
            del logits
        ctx.save_for_backward(images, texts, scale, over_texts, over_images)
        ctx.chunk = chunk
        matched = scale * (images * texts).sum(dim=1)  # (B,)
        return (over_texts.mean() + over_images.mean()) / 2 - matched.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, over_texts, over_images = ctx.saved_tensors

        def by_logits(rows: slice, logits: Tensor) -> Tensor:
            share: Tensor = (logits - over_texts[rows, None]).exp_()  # (n, B), of each image
            share += logits.sub_(over_images).exp_()  # of each text
            share *= 0.5
            share[:, rows].diagonal().sub_(1)
            return share

        found = _backward(images, texts, scale, gradient / len(images), ctx.chunk, by_logits)
        return *found[:3], None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, chunk: int) -> Tensor:
        total = torch.zeros_like(scale)
        for rows, logits in _chunks(images, texts, scale, chunk):
            logits += bias
            logits[:, rows].diagonal().neg_()
            total += F.softplus(logits).sum()
            del logits
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.chunk = chunk
        return total / len(images)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias = ctx.saved_tensors

        def by_logits(rows: slice, logits: Tensor) -> Tensor:
            logits += bias
            matched = logits[:, rows].diagonal()
            wanted = -torch.sigmoid(-matched)
            logits.sigmoid_()
            matched.copy_(wanted)
            return logits

        return *_backward(images, texts, scale, gradient / len(images), ctx.chunk, by_logits), None


def _chunks(images: Tensor, texts: Tensor, scale: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of each chunk and its logits (n, B); whoever takes them lets go of them before the next."""
    for first in range(0, len(images), chunk):
        rows = slice(first, min(first + chunk, len(images)))
        yield rows, (scale * images[rows]) @ texts.T


def _backward(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    factor: Tensor,
    chunk: int,
    by_logits: Callable[[slice, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of images, texts, scale and bias, given ``factor`` times those of the logits, chunk by chunk."""
    for_images, for_texts = torch.empty_like(images), torch.zeros_like(texts)
    for_scale, for_bias = torch.zeros_like(scale), torch.zeros_like(scale)
    with without_autocast(images.device.type):
        for rows, logits in _chunks(images, texts, scale, chunk):
            by_logit = by_logits(rows, logits)  # (n, B)
            by_cosine = by_logit @ texts  # (n, E), times the images the gradient of the scale
            for_images[rows] = scale * by_cosine
            for_texts.addmm_(by_logit.T, scale * images[rows])
            for_scale += (by_cosine * images[rows]).sum()
            for_bias += by_logit.sum()
            del logits, by_logit
    return for_images.mul_(factor), for_texts.mul_(factor), for_scale.mul_(factor), for_bias.mul_(factor)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off, on devices that have it (the meta device does not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
