"""Captions as tokens, by a tokenizer that the configuration names by its dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from gpipe.training.factory import FactoryError, resolve

WORD_TOKENIZER = "gpipe.models.tokenizer.WordTokenizer"


class Tokenizer(Protocol):
    """Texts to token numbers."""

    @property
    def vocabulary_size(self) -> int:
        """Token numbers are below this."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of every text, T: shorter texts are padded."""
        ...

    def __call__(self, texts: list[str], /) -> tuple[Tensor, Tensor]:
        """Tokens (N, T) int64, and where each text ends (N,) int64."""
        ...


def make_tokenizer(path: str, texts: Sequence[str], context_length: int) -> Tokenizer:
    """Import the callable at a dotted path and call it with the training captions and the context length.

    Args:
        path: Such as "gpipe.models.tokenizer.WordTokenizer".
        texts: Captions to learn the vocabulary from.
        context_length: Tokens of every text.

    Raises:
        ValueError: If there is no such callable, or it does not take these two arguments.
    """
    try:
        tokenizer: Tokenizer = resolve(path)(list(texts), context_length)
    except FactoryError as error:
        raise ValueError(f"tokenizer: expected a dotted path such as {WORD_TOKENIZER}: {error}") from error
    except TypeError as error:
        raise ValueError(f"tokenizer: expected a callable of (texts, context_length), got {path}: {error}") from error
    return tokenizer
