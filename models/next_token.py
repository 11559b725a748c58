"""The loss of models that predict the next token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.token_checks import readable

PADDING = -100  # the target of a token that is not to be predicted, as in torch


class NextTokenLoss(nn.Module):
    """Mean over the rows of each row's mean cross-entropy over its tokens, in nats.

    So every row counts alike, however much of it is padding: only a mean over rows is the same whether the loss sees
    the whole mini-batch or one micro-batch after the other (``loss_over: micro_batch``). A mean over all tokens,
    which would give long texts more weight, is another number when rows differ in length, and is not this loss. A
    row without any token to predict adds nothing to the sum, but is counted.
    """

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compare scores with the tokens that came next.

        Computed in float32, or in the scores' own dtype where that is wider, autocast or not.

        Args:
            outputs: logits (B, T, V).
            targets: (B, T) int64, the token after each token; -100 where none is to be predicted, as at padding.

        Returns:
            the mean loss, 0-dimensional, in nats.

        Raises:
            ValueError: if shapes or dtype do not fit, or a target is no token id.
        """
        _check(outputs, targets)
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="none")
        counts = (targets != PADDING).sum(1).clamp(min=1)  # (B,)
        return (nats.view(targets.shape).sum(1) / counts).mean()


def _check(outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 3 or targets.shape != outputs.shape[:2] or not targets.numel():
        raise ValueError(
            "NextTokenLoss: expected logits of shape (B, T, V) and targets of shape (B, T), neither B nor T 0, given "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}; pass one target per token"
        )
    if targets.dtype != torch.int64:
        raise ValueError(
            f"NextTokenLoss: expected targets of dtype torch.int64, given {targets.dtype}; convert them with .long()"
        )
    if not readable(targets):
        return
    low, high = (int(bound) for bound in torch.where(targets == PADDING, 0, targets).aminmax())
    if low < 0 or high >= outputs.shape[2]:
        raise ValueError(
            f"NextTokenLoss: expected targets from 0 to {outputs.shape[2] - 1}, as there are logits, or {PADDING} for "
            f"none, given {low if low < 0 else high}; build the model with the vocabulary_size of the data"
        )
