"""The last cell of a language model with its loss, so that no stage holds the logits of a whole mini-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WithLoss(nn.Module):
    """A language model's last cell and its loss, a number a text."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: Any) -> Tensor:
        """The cross-entropy of token 0 everywhere: costs do not depend on which."""
        logits = self.head(inputs).flatten(0, 1)
        targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = nn.functional.cross_entropy(logits, targets, reduction="none")
        return loss.view(inputs[0].shape[:2]).mean(1)
