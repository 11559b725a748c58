"""From token ids to features and back to scores of token ids."""

import math
from typing import cast

import torch
from torch import Tensor, nn

from gpipe.models.attention import LayerNorm


class TokenEmbedding(nn.Module):
    """Features of token ids, with sines of their positions added (Vaswani et al. 2017, section 3.5).

    Args:
        vocabulary_size: V, number of token ids.
        width: W, features per token.
        dropout: probability of dropping an element in training.
    """

    def __init__(self, vocabulary_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary_size, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.table.weight, std=width**-0.5)  # small, for it may be the output layer's weight as well

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Embed each token.

        Args:
            tokens: (B, T) int64.
            mask: (B, T) bool, true at tokens and false at padding; None: no padding.

        Returns:
            (B, T, W); positions count tokens alone, so it does not matter where the padding is.
        """
        width = self.table.embedding_dim
        if mask is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T)
        x = self.table(tokens) * math.sqrt(width)
        return cast(Tensor, self.dropout(x + sinusoids(positions, width).to(x.dtype)))


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions (...) at wavelengths from 2 pi to 20,000 pi tokens: (..., width) float32."""
    half = -(-width // 2)
    exponents = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half - 1, 1)
    angles = positions[..., None] * torch.exp(-math.log(10_000.0) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[..., :width]


class TokenScores(nn.Module):
    """Scores of the next token: a last normalisation and a linear layer.

    Args:
        vocabulary_size: V, number of token ids.
        width: W, features per token.
        tied: the embedding whose weight the linear layer uses too; None: a weight of its own.
    """

    def __init__(self, vocabulary_size: int, width: int, tied: TokenEmbedding | None) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.linear = nn.Linear(width, vocabulary_size)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        nn.init.zeros_(self.linear.bias)
        if tied is not None:
            self.linear.weight = tied.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., V) of features (..., W)."""
        return cast(Tensor, self.linear(self.norm(x)))
