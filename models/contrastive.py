"""The losses of CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3) and SigLIP (Zhai et al. 2023, arXiv 2303.15343).

Both compare every image of a mini-batch with every text of it, so they must see the whole mini-batch, never a
micro-batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.contrastive_chunks import CHUNK, sigmoid_loss, softmax_loss, without_autocast
from gpipe.models.settings import require_counts


class ContrastiveLoss(nn.Module):
    """Symmetric cross-entropy over the cosine similarities of all images with all texts of a mini-batch.

    Row i of the images belongs to row i of the texts; every other row of the mini-batch is a negative. So the
    loss must see the whole mini-batch, never a micro-batch.

    ``logit_scale``, the logarithm of the inverse temperature, is a parameter of the loss: hand
    ``loss.parameters()`` to the optimizer too, and call :meth:`clamp_` after each of its steps.

    Args:
        inverse_temperature: at the start; 1 / 0.07 as published, 100 where most published models ended.
        chunk: a mini-batch of more pairs than this is never a matrix of all similarities: so many images are compared
            with all texts at a time, forward and again backward. The results are those of the matrix up to rounding.

    Attributes:
        logit_scale: 0-dimensional, float32, the logarithm of ``inverse_temperature`` at first.
        largest: ln 100, the cap that :meth:`clamp_` puts on it.

    Raises:
        ValueError: if ``inverse_temperature`` is not from 1 to 100, or ``chunk`` is not a positive int.
    """

    largest = math.log(100)

    def __init__(self, inverse_temperature: float = 1 / 0.07, chunk: int = CHUNK) -> None:
        super().__init__()
        if not 1 <= inverse_temperature <= 100:
            raise ValueError(
                f"expected inverse_temperature to be from 1 to 100, given {inverse_temperature!r}; clamp_ would bring "
                "it there after the first step"
            )
        require_counts(chunk=chunk)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(inverse_temperature), dtype=torch.float32))
        self.chunk = chunk

    def forward(self, outputs: tuple[Tensor, Tensor], targets: object = None) -> Tensor:
        """Compare every image with every text.

        Computed in float32, or in the features' own dtype where that is wider, autocast or not.

        Args:
            outputs: image features (B, E) and text features (B, E) of the whole mini-batch, not normalised.
            targets: not used, for the pairing of the rows is the target; taken so that the loss can be called
                as any other, ``loss(outputs, targets)``.

        Returns:
            the mean loss, 0-dimensional, in nats.

        Raises:
            ValueError: if the two are not of the same shape (B, E) with B at least 1.
        """
        _check("ContrastiveLoss", *outputs)
        with without_autocast(outputs[0].device.type):
            images, texts = _directions(*outputs)
            scale = self.logit_scale.to(images.dtype).exp()
            if len(images) > self.chunk:
                return softmax_loss(images, texts, scale, self.chunk)
            logits = scale * images @ texts.T  # (B images, B texts)
            pairs = torch.arange(logits.shape[0], device=logits.device)  # (B,)
            return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring ``logit_scale`` back into [0, ln 100], as published; call it after each optimizer step."""
        self.logit_scale.clamp_(0, self.largest)


class SigmoidLoss(nn.Module):
    """SigLIP's loss: is this the text of this image? asked of every image and every text of a mini-batch.

    Row i of the images belongs to row i of the texts. The sum of the binary cross-entropies of all B x B pairs,
    divided by B. It needs no sum over a row or a column, so it holds a chunk of the similarities at a time only.

    ``logit_scale``, the logarithm of the inverse temperature, and ``logit_bias`` are parameters of the loss: hand
    ``loss.parameters()`` to the optimizer too. As published, nothing clamps them.

    Args:
        chunk: images that are compared with all texts at a time.

    Attributes:
        logit_scale: 0-dimensional, float32, ln 10 at first.
        logit_bias: 0-dimensional, float32, -10 at first, for nearly all pairs are wrong ones.

    Raises:
        ValueError: if ``chunk`` is not a positive int.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        super().__init__()
        require_counts(chunk=chunk)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10), dtype=torch.float32))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0, dtype=torch.float32))
        self.chunk = chunk

    def forward(self, outputs: tuple[Tensor, Tensor], targets: object = None) -> Tensor:
        """Ask of every image and every text whether they belong together.

        Computed in float32, or in the features' own dtype where that is wider, autocast or not.

        Args:
            outputs: image features (B, E) and text features (B, E) of the whole mini-batch, not normalised.
            targets: not used, as in `ContrastiveLoss`.

        Returns:
            the loss per image, 0-dimensional, in nats.

        Raises:
            ValueError: if the two are not of the same shape (B, E) with B at least 1.
        """
        _check("SigmoidLoss", *outputs)
        with without_autocast(outputs[0].device.type):
            images, texts = _directions(*outputs)
            scale, bias = self.logit_scale.to(images.dtype).exp(), self.logit_bias.to(images.dtype)
            return sigmoid_loss(images, texts, scale, bias, self.chunk)


def _directions(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (B, E) of length 1, in float32 or wider."""
    wide = torch.promote_types(image_features.dtype, torch.float32)
    return F.normalize(image_features.to(wide), dim=-1), F.normalize(text_features.to(wide), dim=-1)


def _check(loss: str, image_features: Tensor, text_features: Tensor) -> None:
    shapes = tuple(image_features.shape), tuple(text_features.shape)
    if image_features.ndim != 2 or shapes[0] != shapes[1] or not len(image_features):
        raise ValueError(
            f"{loss}: expected image and text features of one shape (B, E) with at least one row, "
            f"given {shapes[0]} and {shapes[1]}; pass the features of one mini-batch of pairs"
        )
