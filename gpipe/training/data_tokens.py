"""Captions as tokens, by a tokenizer that the configuration names by its dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Protocol

from torch import Tensor

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
        ValueError: If there is no such callable.
    """
    try:
        factory = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"data.tokenizer: expected the dotted path of a callable, such as {WORD_TOKENIZER}, got {path!r}: {error}"
        ) from error
    if not callable(factory):
        raise ValueError(f"data.tokenizer: expected a callable, got {path!r}, which is a {type(factory).__name__}")
    tokenizer: Tokenizer = factory(list(texts), context_length)
    return tokenizer
