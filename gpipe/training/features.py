"""Features of images and texts: the only place where evaluation calls a contrastive model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpipe.training.data_images import Images
from gpipe.training.data_tokens import Tokenizer


class Encoder(Protocol):
    """What evaluation calls of a contrastive model."""

    def encode_image(self, images: Tensor, /) -> Tensor:
        """Features (N, E) of images (N, C, H, W)."""
        ...

    def encode_text(self, tokens: Tensor, end: Tensor, /) -> Tensor:
        """Features (N, E) of tokens (N, T) that end at ``end`` (N,)."""
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Within, ``model`` is in eval mode and nothing records gradients; afterwards every module is as it was.

    Yields:
        The device of the model's parameters.
    """
    modes = {module: module.training for module in model.modules()}
    first = next(model.parameters(), None)
    model.eval()
    try:
        with torch.inference_mode():
            yield first.device if first is not None else torch.device("cpu")
    finally:
        for module, mode in modes.items():
            module.training = mode


def encode_images(model: nn.Module, images: Images, *, batch_size: int) -> Tensor:
    """Features of all images, not normalised: (N, E) float32 on the CPU.

    Args:
        model: With a method ``encode_image``.
        images: N images, as the model is given them.
        batch_size: How many go through the model at once.

    Raises:
        ValueError: If the model cannot encode images, or gives features that are not finite.
    """
    encoder = _encoder(model)
    with evaluating(model) as device:
        return _in_chunks(lambda rows: encoder.encode_image(images[rows].to(device)), len(images), batch_size, "images")


def encode_texts(model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """Features of all texts, not normalised: (N, E) float32 on the CPU.

    Args:
        model: With a method ``encode_text``.
        tokenizer: The one of the training data.
        texts: N texts.
        batch_size: How many go through the model at once.

    Raises:
        ValueError: If the model cannot encode texts, or gives features that are not finite.
    """
    encoder = _encoder(model)
    tokens, end = tokenizer(list(texts))
    with evaluating(model) as device:
        return _in_chunks(
            lambda rows: encoder.encode_text(tokens[rows].to(device), end[rows].to(device)),
            len(texts),
            batch_size,
            "texts",
        )


def unit(features: Tensor) -> Tensor:
    """Features divided by their length, so that products are cosines: (..., E) to (..., E)."""
    return functional.normalize(features, dim=-1)


def _encoder(model: nn.Module) -> Encoder:
    missing = [name for name in ("encode_image", "encode_text") if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(
            f"expected a model with the methods encode_image and encode_text, got {type(model).__name__} without "
            f"{' and '.join(missing)}: pass the model itself, not a pipe around it, or give it these methods"
        )
    return cast(Encoder, model)


def _in_chunks(encode: Callable[[Tensor], Tensor], total: int, batch_size: int, what: str) -> Tensor:
    chunks = [encode(rows).float().cpu() for rows in torch.split(torch.arange(total), batch_size)]
    features = torch.cat(chunks)
    wrong = ~features.isfinite().all(dim=1)
    if wrong.any():
        raise ValueError(
            f"expected finite features, got NaN or infinity for {int(wrong.sum())} of {total} {what}: "
            "the training has diverged; lower the learning rate, or evaluate weights saved earlier"
        )
    return features
