"""The contrastive loss of CLIP (Radford et al. 2021, arXiv 2103.00020, figure 3)."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ContrastiveLoss(nn.Module):
    """Symmetric cross-entropy over the cosine similarities of all images with all texts of a mini-batch.

    Row i of the images belongs to row i of the texts; every other row of the mini-batch is a negative. So the
    loss must see the whole mini-batch, never a micro-batch.

    ``logit_scale``, the logarithm of the inverse temperature, is a parameter of the loss: hand
    ``loss.parameters()`` to the optimizer too, and call :meth:`clamp_` after each of its steps.

    Attributes:
        logit_scale: 0-dimensional, float32, ln(1 / 0.07) at first.
        largest: ln 100, the cap that :meth:`clamp_` puts on it.
    """

    largest = math.log(100)

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07), dtype=torch.float32))

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
        image_features, text_features = outputs
        _check(image_features, text_features)
        with _without_autocast(image_features.device.type):
            logits = self._logits(image_features, text_features)  # (B images, B texts)
            pairs = torch.arange(logits.shape[0], device=logits.device)  # (B,)
            return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    def _logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        wide = torch.promote_types(image_features.dtype, torch.float32)
        images = F.normalize(image_features.to(wide), dim=-1)  # (B, E)
        texts = F.normalize(text_features.to(wide), dim=-1)  # (B, E)
        return self.logit_scale.to(wide).exp() * images @ texts.T  # (B, B)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring ``logit_scale`` back into [0, ln 100], as published; call it after each optimizer step."""
        self.logit_scale.clamp_(0, self.largest)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast switched off, on devices that have it (the meta device does not)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check(image_features: Tensor, text_features: Tensor) -> None:
    shapes = tuple(image_features.shape), tuple(text_features.shape)
    if image_features.ndim != 2 or shapes[0] != shapes[1] or not len(image_features):
        raise ValueError(
            "ContrastiveLoss: expected image and text features of one shape (B, E) with at least one row, "
            f"given {shapes[0]} and {shapes[1]}; pass the features of one mini-batch of pairs"
        )
