"""CLIP's text tower as cells, and the check of what goes into it (Radford et al. 2021, arXiv 2103.00020)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gpipe.models.attention import LayerNorm
from gpipe.models.freezing import Freezable
from gpipe.models.token_checks import check_text_length, check_token_ids, readable

# What the text cells pass on: image features (B, E), token features (B, T, W), end (B,).
TextBoundary = tuple[Tensor | None, Tensor, Tensor]


@dataclass(frozen=True)
class TextLimits:
    """What a text tower can read.

    Attributes:
        context_length: most tokens of a text.
        vocabulary_size: token ids run from 0 to ``vocabulary_size - 1``.
    """

    context_length: int
    vocabulary_size: int

    def check(self, tokens: Tensor, end: Tensor) -> None:
        """Refuse texts the tower cannot read.

        The values are looked at on the CPU only: on an accelerator that would wait for the device.

        Args:
            tokens: (B, T) int64, T at most the context length.
            end: (B,) int64, the index in 0..T-1 of each text's end token.

        Raises:
            ValueError: saying what was expected, what was given and what to do.
        """
        self._check_form(tokens, end)
        check_token_ids("CLIP texts", tokens, self.vocabulary_size)
        if not readable(end) or not end.numel():
            return
        low, high = (int(bound) for bound in end.aminmax())
        if low < 0 or high >= tokens.shape[1]:
            raise ValueError(
                f"CLIP texts: expected end indices from 0 to {tokens.shape[1] - 1} for tokens of shape "
                f"{tuple(tokens.shape)}, given indices from {low} to {high}; pass the index of each end token"
            )

    def _check_form(self, tokens: Tensor, end: Tensor) -> None:
        if tokens.ndim != 2 or end.shape != tokens.shape[:1]:
            raise ValueError(
                "CLIP texts: expected tokens of shape (B, T) and end indices of shape (B,), "
                f"given {tuple(tokens.shape)} and {tuple(end.shape)}; "
                "pass one row of tokens and one index per text"
            )
        if tokens.dtype != torch.int64 or end.dtype != torch.int64:
            raise ValueError(
                f"CLIP texts: expected tokens and end indices of dtype torch.int64, given {tokens.dtype} "
                f"and {end.dtype}; convert them with .long()"
            )
        check_text_length("CLIP texts", tokens, self.context_length)


class TextStem(Freezable):
    """First cell of the text tower: token and positional embeddings.

    Args:
        token_embedding: the model's, (vocabulary, W).
        positional_embedding: the model's, (context, W).
        limits: what the tower can read.
    """

    def __init__(self, token_embedding: nn.Embedding, positional_embedding: nn.Parameter, limits: TextLimits) -> None:
        super().__init__()
        self.token_embedding = token_embedding
        self.positional_embedding = positional_embedding
        self.limits = limits

    def forward(self, inputs: tuple[Tensor | None, Tensor | None, Tensor | None]) -> TextBoundary:
        """Embed the tokens.

        Args:
            inputs: image features (B, E) or None, tokens (B, T) int64, end (B,) int64.

        Returns:
            image features, token features (B, T, W), end.

        Raises:
            ValueError: if the tokens or end indices are missing or are not what the tower can read.
        """
        image_features, tokens, end = inputs
        if tokens is None or end is None:
            raise ValueError(
                "CLIP texts: expected (images, tokens, end), given None for the tokens or the end indices; "
                "pass both, or call encode_image for images alone"
            )
        self.limits.check(tokens, end)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, T, W)
        return image_features, x, end


class TextBlock(Freezable):
    """A cell of the text tower: one block applied to the token features.

    Args:
        block: the model's.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: TextBoundary) -> TextBoundary:
        """Transform the token features (B, T, W); image features and end ride along."""
        image_features, x, end = inputs
        return image_features, self.block(x), end


class TextHead(Freezable):
    """Last cell of the text tower: the feature at each text's end token, normalised and projected.

    Args:
        ln_final: the model's.
        text_projection: the model's, (W, E).
    """

    def __init__(self, ln_final: LayerNorm, text_projection: nn.Parameter) -> None:
        super().__init__()
        self.ln_final = ln_final
        self.text_projection = text_projection

    def forward(self, inputs: TextBoundary) -> tuple[Tensor | None, Tensor]:
        """Give image features as they came and text features (B, E)."""
        image_features, x, end = inputs
        x = x[torch.arange(x.shape[0], device=x.device), end]  # (B, W)
        return image_features, cast(Tensor, self.ln_final(x) @ self.text_projection)  # (B, E)
