"""From texts to token ids: what a tokenizer must do, and one over words."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_WORD_OR_PUNCTUATION = re.compile(r"\w+|[^\w\s]")


class Tokenizer(Protocol):
    """What turns texts into the input of a text tower."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids: they run from 0 to ``vocabulary_size - 1``."""
        ...

    @property
    def context_length(self) -> int:
        """Number of tokens a text is padded to."""
        ...

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Turn N texts into tokens (N, context length) int64 and the index of each end token (N,) int64."""
        ...


class WordTokenizer:
    """A tokenizer over the words and punctuation marks of given texts.

    A text becomes ``<start> word ... <end> <padding> ...``, in lower case; a word not in the vocabulary is
    ``<unknown>``. The ids depend on the set of words alone, not on the order they came in: the four special
    tokens, then the words sorted by code point. So the captions of a data set, or :attr:`words` of another
    tokenizer, give the same ids again.

    Args:
        texts: words or whole texts; all their words are the vocabulary.
        context_length: number of tokens a text is padded to, at least 2 for start and end.

    Attributes:
        words: the vocabulary without the special tokens, in the order of their ids.

    Raises:
        ValueError: if ``context_length`` is too small, or ``texts`` is one text rather than several.
    """

    specials = ("<padding>", "<unknown>", "<start>", "<end>")
    padding, unknown, start, end = range(4)

    def __init__(self, texts: Iterable[str], context_length: int) -> None:
        if not isinstance(context_length, int) or context_length < 2:  # so True, which is 1, is refused too
            raise ValueError(
                "WordTokenizer: expected context_length to be a whole number of at least 2, "
                f"given {context_length!r}; "
                "count the words of the longest text and add 2 for its start and end"
            )
        _refuse_one_text(texts)
        self.words = tuple(sorted({word for text in texts for word in split_words(text)}))
        self._context_length = context_length
        self._ids = {word: number for number, word in enumerate(self.words, start=len(self.specials))}

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids, the special ones among them."""
        return len(self.specials) + len(self.words)

    @property
    def context_length(self) -> int:
        """Number of tokens a text is padded to."""
        return self._context_length

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Turn texts into token ids.

        Args:
            texts: N texts, each of at most ``context_length - 2`` words and punctuation marks.

        Returns:
            tokens (N, context length) int64, and end (N,) int64, the index of each text's end token.

        Raises:
            ValueError: if a text is too long (nothing is cut off), or ``texts`` is a single text.
        """
        _refuse_one_text(texts)
        tokens = torch.full((len(texts), self.context_length), self.padding)  # (N, context)
        end = torch.empty(len(texts), dtype=torch.int64)  # (N,)
        for row, text in enumerate(texts):
            ids = self._encode(row, text)
            tokens[row, : len(ids)] = torch.tensor(ids)
            end[row] = len(ids) - 1
        return tokens, end

    def _encode(self, row: int, text: str) -> Sequence[int]:
        words = split_words(text)
        if len(words) + 2 > self.context_length:
            raise ValueError(
                f"WordTokenizer: expected at most {self.context_length - 2} words and punctuation marks a "
                f"text (context_length={self.context_length} less start and end), given {len(words)} in text "
                f"{row}: {text!r}; shorten it, or set context_length to at least {len(words) + 2}"
            )
        return [self.start, *(self._ids.get(word, self.unknown) for word in words), self.end]


def split_words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case and in order.

    Args:
        text: any text. Composed and decomposed spellings of an accented letter are one and the same.
    """
    return _WORD_OR_PUNCTUATION.findall(unicodedata.normalize("NFC", text.lower()))


def _refuse_one_text(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"WordTokenizer: expected several texts, given the single text {texts!r}; pass [text] for one")
