"""What the benchmarks train: five models at sizes for a CPU, to fill an accelerator, and tiny, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gpipe.models.amoebanet import Stem, amoebanet_d
from gpipe.models.clip import clip
from gpipe.models.contrastive import ContrastiveLoss
from gpipe.models.resnet import resnet
from gpipe.models.unet import unet

WIDTH, HEADS, FEED_FORWARD, SEQUENCE, BATCH, LAYERS = 512, 8, 2048, 128, 32, 8


def layers(count: int, width: int = WIDTH, heads: int = HEADS, feed_forward: int = FEED_FORWARD) -> nn.Sequential:
    """Transformer encoder layers without dropout."""
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(width, heads, feed_forward, dropout=0.0, batch_first=True) for _ in range(count))
    )


def data() -> tuple[Tensor, Tensor]:
    """One mini-batch of inputs and targets, (BATCH, SEQUENCE, WIDTH) each."""
    torch.manual_seed(0)
    return torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(BATCH, SEQUENCE, WIDTH)


@dataclass(frozen=True)
class Net:
    """A model with what it trains on.

    Attributes:
        about: Its size, in words.
        module: Makes it.
        inputs: Makes so many rows of inputs; (rows,) is put in front of every shape.
        targets: Makes their targets.
        loss: Makes the loss, a mean over rows that micro-batches are given one by one.
        rows: Of a mini-batch.
    """

    about: str
    module: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    targets: Callable[[int], Tensor]
    loss: Callable[[], nn.Module]
    rows: int

    def made(self) -> tuple[nn.Module, nn.Module]:
        """Model and loss, from the same seed wherever they are made."""
        torch.manual_seed(0)
        return self.module(), self.loss()

    def batch(self) -> tuple[Any, Tensor]:
        """Inputs and targets of a mini-batch, always the same."""
        torch.manual_seed(1)
        return self.inputs(self.rows), self.targets(self.rows)


def parts(tree: Any, chunks: int) -> list[Any]:
    """The micro-batches of ``tree``: its tensors' rows in as many equal parts."""
    return [tree_map_only(Tensor, partial(_part, chunks, m), tree) for m in range(chunks)]


def _part(chunks: int, m: int, tensor: Tensor) -> Tensor:
    return tensor.chunk(chunks)[m]


def moved(tree: Any, device: torch.device) -> Any:
    """``tree`` with its tensors on ``device``."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


def normal(*shape: int) -> Callable[[int], Tensor]:
    """Rows of normal numbers."""
    return lambda rows: torch.randn(rows, *shape)


def classes(count: int) -> Callable[[int], Tensor]:
    """Rows of classes."""
    return lambda rows: torch.randint(count, (rows,))


def transformer(*, width: int, count: int, sequence: int, rows: int) -> Net:
    """Even: encoder layers, all alike."""
    return Net(
        f"{count} encoder layers, d {width}, feed-forward {4 * width}, sequence {sequence}, batch {rows}",
        partial(layers, count, width, width // 32, 4 * width),
        normal(sequence, width),
        normal(sequence, width),
        nn.MSELoss,
        rows,
    )


def clip_vit(*, width: int, text_width: int, count: int, side: int, context: int, rows: int) -> Net:
    """Uneven: two towers of different width, the image tower first."""

    def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(n, 3, side, side), torch.randint(1000, (n, context)), torch.full((n,), context - 1)

    make = partial(
        clip,
        image_size=side,
        patch_size=8,
        vision_width=width,
        vision_layers=count,
        vision_heads=width // 32,
        text_width=text_width,
        text_layers=count,
        text_heads=text_width // 32,
        embed_dim=width // 2,
        activation="gelu",
        context_length=context,
        vocabulary_size=1000,
    )
    about = (
        f"ViT {count} layers d {width} of {side} x {side} pixels by 8, text {count} layers d {text_width} of {context} "
        f"tokens, batch {rows}, contrastive loss within each micro-batch"
    )
    return Net(about, make, inputs, normal(), ContrastiveLoss, rows)


def amoebanet(*, count: int, filters: int, side: int, rows: int, stem: Stem = "small") -> Net:
    """Uneven: cells with two states, ever fewer pixels and more filters."""
    return Net(
        f"AmoebaNet-D ({count}, {filters}), {stem} stem, {side} x {side} pixels, batch {rows}",
        partial(amoebanet_d, count, filters, num_classes=10, stem=stem),
        normal(3, side, side),
        classes(10),
        nn.CrossEntropyLoss,
        rows,
    )


def u_net(*, depth: int, count: int, channels: int, side: int, rows: int) -> Net:
    """Uneven, with skip connections from the first cells to the last."""
    return Net(
        f"U-Net ({count}, {channels}), depth {depth}, {side} x {side} pixels, batch {rows}",
        partial(unet, depth=depth, num_convs=count, base_channels=channels, dropout=0.0),
        normal(3, side, side),
        normal(1, side, side),
        nn.MSELoss,
        rows,
    )


def resnet50(*, side: int, rows: int) -> Net:
    """Torchvision's, on small images."""
    return Net(
        f"{side} x {side} pixels, batch {rows}",
        partial(resnet, "resnet50", num_classes=10),
        normal(3, side, side),
        classes(10),
        nn.CrossEntropyLoss,
        rows,
    )


NETS: dict[str, dict[str, Net]] = {
    "full": {
        "Transformer": transformer(width=256, count=8, sequence=64, rows=32),
        "CLIP ViT": clip_vit(width=192, text_width=128, count=4, side=64, context=32, rows=32),
        "AmoebaNet-D": amoebanet(count=6, filters=16, side=32, rows=32),
        "U-Net": u_net(depth=3, count=2, channels=16, side=64, rows=32),
        "ResNet-50": resnet50(side=48, rows=32),
    },
    "accelerator": {
        "Transformer": transformer(width=1024, count=12, sequence=512, rows=64),
        "CLIP ViT": clip_vit(width=768, text_width=512, count=12, side=224, context=77, rows=64),
        "AmoebaNet-D": amoebanet(count=18, filters=128, side=224, rows=64, stem="imagenet"),
        "U-Net": u_net(depth=4, count=2, channels=64, side=192, rows=64),
        "ResNet-50": resnet50(side=224, rows=256),
    },
    "tiny": {
        "Transformer": transformer(width=32, count=4, sequence=4, rows=4),
        "CLIP ViT": clip_vit(width=32, text_width=32, count=1, side=16, context=4, rows=4),
        "AmoebaNet-D": amoebanet(count=3, filters=8, side=8, rows=4),
        "U-Net": u_net(depth=2, count=1, channels=4, side=16, rows=4),
        "ResNet-50": resnet50(side=32, rows=4),
    },
}
