"""Parts of a model that fine-tuning leaves as they are."""

from typing import Self

from torch import nn


class Freezable(nn.Module):
    """A module that stays in eval mode while it is frozen: batch norm keeps its statistics, dropout drops nothing.

    Attributes:
        frozen: whether ``train()`` leaves it, and all below it, in eval mode.
    """

    frozen = False

    def train(self, mode: bool = True) -> Self:
        """As of any module, but a frozen one goes to eval mode whatever ``mode`` says."""
        return super().train(mode and not self.frozen)

    def freeze(self) -> None:
        """Go to eval mode for good and take gradients from no parameter."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()
