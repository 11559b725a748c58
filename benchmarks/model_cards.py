"""What are the shipped models made of?

Run: python -m benchmarks.model_cards          prints the table that README shows; nothing is allocated or timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpipe.models.amoebanet import amoebanet_d
from gpipe.models.clip import clip
from gpipe.models.resnet import resnet
from gpipe.models.transformer import gpipe_table1, language_model, translation
from gpipe.models.unet import unet
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.estimate import Speed, estimate

QUESTION = "What are the shipped models made of: cells, parameters, operations, activations?"
ROWS = 2  # a sample is half of them: batch norm wants two


def images(size: int) -> Callable[[], Tensor]:
    """A batch of images (ROWS, 3, size, size)."""
    return lambda: torch.empty(ROWS, 3, size, size, device="meta")


def tokens(length: int) -> Callable[[], Tensor]:
    """A batch of token ids (ROWS, length)."""
    return lambda: torch.empty(ROWS, length, dtype=torch.long, device="meta")


def pairs(length: int) -> Callable[[], Any]:
    """Sentences and their translations, nothing padded."""
    mask = torch.ones(ROWS, length, dtype=torch.bool, device="meta")
    return lambda: ((tokens(length)(), mask), (tokens(length)(), mask))


def captioned(size: int) -> Callable[[], Any]:
    """Images, their captions, and where these end, as CLIP takes them."""
    return lambda: (images(size)(), tokens(77)(), torch.empty(ROWS, dtype=torch.long, device="meta"))


Models = dict[str, tuple[str, Callable[[], nn.Module], Callable[[], Any]]]
MODELS: Models = {
    "ResNet-50": ("224 x 224", lambda: resnet("resnet50"), images(224)),
    "ResNet-101": ("224 x 224", lambda: resnet("resnet101"), images(224)),
    "U-Net (5, 64)": ("192 x 192", lambda: unet(depth=5, num_convs=5, base_channels=64, in_channels=3), images(192)),
    "AmoebaNet-D (18, 256)": ("224 x 224", lambda: amoebanet_d(18, 256), images(224)),
    "AmoebaNet-D (36, 544)": ("224 x 224", lambda: amoebanet_d(36, 544), images(224)),
    "CLIP RN50": ("224 x 224, 77 tokens", lambda: clip("RN50"), captioned(224)),
    "CLIP ViT-B/32": ("224 x 224, 77 tokens", lambda: clip("ViT-B/32"), captioned(224)),
    "CLIP ViT-L/14": ("224 x 224, 77 tokens", lambda: clip("ViT-L/14"), captioned(224)),
    "language model, 12 x 768": (
        "1,024 tokens",
        lambda: language_model(vocabulary_size=50_257, width=768, layers=12, heads=12, context_length=1024, tied=True),
        tokens(1024),
    ),
    "the same, Hyena": (
        "1,024 tokens",
        lambda: language_model(
            vocabulary_size=50_257, width=768, layers=12, heads=12, context_length=1024, tied=True, mixer="hyena"
        ),
        tokens(1024),
    ),
    "GPipe's Table 1, 13 layers": ("1,024 tokens", lambda: gpipe_table1(13), tokens(1024)),
    "translation T(6, 8192, 16)": (
        "128 + 128 tokens",
        lambda: translation(layers=6, feed_forward=8192, heads=16),
        pairs(128),
    ),
}


def row(name: str, about: str, build: Callable[[], nn.Module], sample: Callable[[], Any]) -> list[str]:
    """A model's line of the table."""
    with torch.device("meta"):
        model = build()
    counting = Speed(flops=1.0, bytes=math.inf)  # a second an operation
    costs = estimate(model, sample(), speed=counting)
    return [
        name,
        about,
        str(len(cells_of(model))),
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{sum(cost.forward_seconds for cost in costs) / ROWS / 1e9:,.1f} G",
        f"{sum(cost.activation_bytes for cost in costs) / ROWS / 2**20:,.0f} MiB",
    ]


def table() -> str:
    """The table in Markdown."""
    head = ["model", "a sample", "cells", "parameters", "FLOPs forward a sample", "activations a sample"]
    lines = [head, ["---"] * len(head), *(row(name, *model) for name, model in MODELS.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
