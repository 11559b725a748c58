"""Checks of the tokens a model is given: what was expected, what was given, what to do.

Values are looked at on the CPU only: on an accelerator that would wait for the device.
"""

import torch
from torch import Tensor


def check_tokens(where: str, tokens: Tensor, mask: Tensor | None, *, context_length: int, vocabulary_size: int) -> None:
    """Refuse texts that a model cannot read.

    Args:
        where: what the messages begin with.
        tokens: (B, T) int64, T at most the context length.
        mask: (B, T) bool, true at tokens and false at padding; None: no padding.
        context_length: most tokens of a text.
        vocabulary_size: token ids, those at padding too, run from 0 to ``vocabulary_size - 1``.

    Raises:
        ValueError: saying what was expected, what was given and what to do.
    """
    if tokens.ndim != 2:
        raise ValueError(
            f"{where}: expected tokens of shape (B, T), given {tuple(tokens.shape)}; pass one row of tokens per text"
        )
    if tokens.dtype != torch.int64:
        raise ValueError(
            f"{where}: expected tokens of dtype torch.int64, given {tokens.dtype}; convert them with .long()"
        )
    check_text_length(where, tokens, context_length)
    if mask is not None and (mask.shape != tokens.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"{where}: expected a mask of shape {tuple(tokens.shape)}, as the tokens, and dtype torch.bool, given "
            f"{tuple(mask.shape)} and {mask.dtype}; pass true at tokens and false at padding, or None"
        )
    check_token_ids(where, tokens, vocabulary_size)


def check_no_text_is_empty(where: str, mask: Tensor | None) -> None:
    """Refuse a row of padding alone, where there would be nothing to attend to.

    Args:
        where: what the message begins with.
        mask: (B, T) bool, true at tokens and false at padding; None: no padding.

    Raises:
        ValueError: naming the first such row.
    """
    if mask is None or not readable(mask):
        return
    empty = (~mask.any(1)).nonzero()
    if len(empty):
        raise ValueError(
            f"{where}: expected at least one token in every row of the mask, given none in row {int(empty[0])}; "
            "leave such rows out, or give them an end token"
        )


def check_text_length(where: str, tokens: Tensor, context_length: int) -> None:
    """Refuse texts longer than the model was built for.

    Args:
        where: what the message begins with.
        tokens: (B, T).
        context_length: most tokens of a text.

    Raises:
        ValueError: if T is above ``context_length``.
    """
    if tokens.shape[1] > context_length:
        raise ValueError(
            f"{where}: expected at most context_length={context_length} tokens a text, "
            f"given {tokens.shape[1]}; shorten the texts, or build the model with a longer context_length"
        )


def check_token_ids(where: str, tokens: Tensor, vocabulary_size: int) -> None:
    """Refuse token ids outside the vocabulary, where they can be looked at for free.

    Args:
        where: what the message begins with.
        tokens: int64, of any shape.
        vocabulary_size: ids run from 0 to ``vocabulary_size - 1``.

    Raises:
        ValueError: giving the lowest and highest id.
    """
    if not readable(tokens) or not tokens.numel():
        return
    low, high = (int(bound) for bound in tokens.aminmax())
    if low < 0 or high >= vocabulary_size:
        raise ValueError(
            f"{where}: expected token ids from 0 to {vocabulary_size - 1} "
            f"(vocabulary_size={vocabulary_size}), given ids from {low} to {high}; "
            "use the tokenizer the model was built for, or build the model with its vocabulary_size"
        )


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values is free: a plain CPU tensor, neither fake nor another subclass."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor
