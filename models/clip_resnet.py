"""CLIP's modified ResNets, their parameters and their cells (Radford et al. 2021, arXiv 2103.00020, section 2.4).

Three things differ from torchvision's ResNets: the stem has three convolutions and an average pool; where a block has
a stride, pixels are averaged before the convolution instead of left out (anti-aliasing, arXiv 1904.11486); and the
pixels are pooled by attention, whose only query is their mean.
"""

from collections import OrderedDict
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.clip_images import ImageBoundary, ImageLimits, ImageTower
from gpipe.models.clip_text import TextLimits
from gpipe.models.freezing import Freezable
from gpipe.models.settings import require_counts, require_multiple

REDUCTION = 32
"""Pixels of the image along a side of one pixel of the last features."""


class Bottleneck(nn.Module):
    """A residual block: 1 x 1, 3 x 3 and 1 x 1 convolution, the stride as an average pool before the third.

    Args:
        channels: of the input.
        inner: channels of the first two convolutions; the block gives four times as many.
        stride: 1 or 2.
    """

    expansion = 4

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = inner * self.expansion
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        nn.init.zeros_(self.bn3.weight)  # as published: every block starts as its shortcut
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != outer:
            pool, convolution = nn.AvgPool2d(stride), nn.Conv2d(channels, outer, 1, bias=False)
            parts = [("-1", pool), ("0", convolution), ("1", nn.BatchNorm2d(outer))]  # the published names
            self.downsample = nn.Sequential(OrderedDict[str, nn.Module](parts))

    def forward(self, x: Tensor) -> Tensor:
        """From (B, channels, H, W) to (B, 4 inner, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.avgpool(y)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(y + shortcut, inplace=True)


class AttentionPool(nn.Module):
    """Attention over the pixels with their mean as the only query.

    Args:
        side: height and width of the features.
        width: C, features per pixel; a multiple of ``heads``.
        heads: attention heads.
        embed_dim: E, features of an image.
    """

    def __init__(self, side: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for linear in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """From pixel features (B, C, side, side) to image features (B, E)."""
        x = x.flatten(2).transpose(1, 2)  # (B, N - 1, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, N, C)
        query, key, value = self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x)
        y = F.scaled_dot_product_attention(self._by_head(query), self._by_head(key), self._by_head(value))
        return cast(Tensor, self.c_proj(y.transpose(1, 2).flatten(1)))  # (B, E)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, N, C / heads)


class ModifiedResNet(ImageTower):
    """The parameters of the image tower under their published names; it runs as the cells it gives.

    Initialised as published: the last batch norm of each block has gain 0, the attention pool's matrices have standard
    deviation C^-0.5, the rest as torch does by default.

    Args:
        image_size: side of the square images in pixels; a multiple of 32.
        vision_width: channels of the stem's output; even. The last features are 32 times as wide.
        vision_layers: blocks in each of the four groups; the last three halve the sides.
        vision_heads: heads of the attention pool.
        embed_dim: E, features of an image.
        in_channels: C, colour channels of an image.

    Raises:
        ValueError: if a setting is out of range or two do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int,
        vision_width: int,
        vision_layers: tuple[int, int, int, int],
        vision_heads: int,
        embed_dim: int,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_settings(image_size, vision_width, vision_layers, vision_heads, embed_dim, in_channels)
        self.image_size = image_size
        self.embed_dim = embed_dim
        half = vision_width // 2
        self.conv1 = nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, vision_width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(vision_width)
        self.avgpool = nn.AvgPool2d(2)
        channels = vision_width
        for number, blocks in enumerate(vision_layers):
            inner = vision_width * 2**number
            self.add_module(f"layer{number + 1}", _group(channels, inner, blocks, stride=2 if number else 1))
            channels = inner * Bottleneck.expansion
        self.attnpool = AttentionPool(image_size // REDUCTION, channels, vision_heads, embed_dim)

    def cells(self, limits: TextLimits) -> list[nn.Module]:
        """The tower as cells: stem, one per block, attention pool.

        Args:
            limits: what the text tower can read, so that the first cell refuses bad texts too.
        """
        groups = (cast(nn.Sequential, getattr(self, f"layer{number}")) for number in (1, 2, 3, 4))
        blocks = [PixelCell(block) for group in groups for block in group]
        return [PixelStem(self, limits), *blocks, PixelCell(self.attnpool)]


def _group(channels: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, inner, stride)
    return nn.Sequential(first, *(Bottleneck(inner * Bottleneck.expansion, inner, 1) for _ in range(blocks - 1)))


def _check_settings(
    image_size: int, width: int, layers: tuple[int, int, int, int], heads: int, embed_dim: int, in_channels: int
) -> None:
    if len(layers) != 4:
        raise ValueError(
            f"expected vision_layers of a ResNet to be four whole numbers, given {layers!r}; "
            "give the blocks of each of the four groups, or one whole number for a Vision Transformer"
        )
    counts = {f"vision_layers[{number}]": blocks for number, blocks in enumerate(layers)}
    require_counts(image_size=image_size, vision_width=width, vision_heads=heads, **counts)
    require_counts(embed_dim=embed_dim, in_channels=in_channels)
    require_multiple("image_size", image_size, "the ResNet's reduction", REDUCTION)
    require_multiple("vision_width", width, "the stem's 2 steps", 2)
    require_multiple("32 vision_width", 32 * width, "vision_heads", heads)


class PixelStem(Freezable):
    """First cell of the image tower: three convolutions and an average pool.

    Args:
        visual: the tower whose parameters the cell holds.
        limits: what the text tower can read.
    """

    def __init__(self, visual: ModifiedResNet, limits: TextLimits) -> None:
        super().__init__()
        self.conv1, self.bn1 = visual.conv1, visual.bn1
        self.conv2, self.bn2 = visual.conv2, visual.bn2
        self.conv3, self.bn3 = visual.conv3, visual.bn3
        self.avgpool = visual.avgpool
        self.limits = ImageLimits(visual.conv1.in_channels, visual.image_size, limits)

    def forward(self, inputs: tuple[Tensor, Tensor | None, Tensor | None]) -> ImageBoundary:
        """Turn pixels into features; texts ride along.

        Args:
            inputs: images (B, C, S, S) of any floating dtype, computed in that of the parameters;
                tokens (B, T) int64 or None; end (B,) int64 or None.

        Returns:
            features (B, W, S / 4, S / 4); tokens; end.

        Raises:
            ValueError: if images or texts are not what the model can read.
        """
        images, tokens, end = inputs
        self.limits.check(images, tokens, end)
        x = images.to(self.conv1.weight.dtype)
        for convolution, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(convolution(x)), inplace=True)
        return self.avgpool(x), tokens, end


class PixelCell(Freezable):
    """A cell of the image tower: a block, or the attention pool, applied to the pixel features.

    Args:
        part: the model's block or attention pool.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: ImageBoundary) -> ImageBoundary:
        """Transform the pixel features (B, C, H, W); tokens and end ride along."""
        x, tokens, end = inputs
        return self.part(x), tokens, end
