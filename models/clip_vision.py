"""CLIP's Vision Transformer, its parameters and its cells (Radford et al. 2021, arXiv 2103.00020)."""

from typing import cast

import torch
from torch import Tensor, nn

from gpipe.models.attention import Activation, LayerNorm, Transformer, check_tower
from gpipe.models.clip_images import ImageBoundary, ImageLimits, ImageTower
from gpipe.models.clip_text import TextLimits
from gpipe.models.freezing import Freezable
from gpipe.models.settings import require_multiple


class VisionTransformer(ImageTower):
    """The parameters of the image tower under their published names; it runs as the cells it gives.

    Initialised as published: class token, positions and projection with standard deviation W^-0.5, the rest
    as torch does by default.

    Args:
        image_size: side of the square images in pixels; a multiple of ``patch_size``.
        patch_size: side of a square patch in pixels.
        vision_width: W, features per patch; a multiple of ``vision_heads``.
        vision_layers: number of blocks.
        vision_heads: attention heads of a block.
        embed_dim: E, features of an image.
        activation: ``"quick_gelu"`` (published weights need it) or ``"gelu"``.
        in_channels: C, colour channels of an image.
        dropout: probability of dropping, in training; see :class:`gpipe.models.attention.Block`.

    Raises:
        ValueError: if a setting is out of range or two do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        vision_width: int,
        vision_layers: int,
        vision_heads: int,
        embed_dim: int,
        activation: Activation,
        in_channels: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_tower(
            "vision",
            width=vision_width,
            layers=vision_layers,
            heads=vision_heads,
            dropout=dropout,
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            in_channels=in_channels,
        )
        require_multiple("image_size", image_size, "patch_size", patch_size)
        self.image_size = image_size
        self.embed_dim = embed_dim
        scale = vision_width**-0.5
        positions = (image_size // patch_size) ** 2 + 1  # N
        self.conv1 = nn.Conv2d(in_channels, vision_width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(vision_width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, vision_width))
        self.ln_pre = LayerNorm(vision_width)
        self.transformer = Transformer(vision_width, vision_layers, vision_heads, activation, dropout=dropout)
        self.ln_post = LayerNorm(vision_width)
        self.proj = nn.Parameter(scale * torch.randn(vision_width, embed_dim))

    def cells(self, limits: TextLimits) -> list[nn.Module]:
        """The tower as cells: stem, one per block, head.

        Args:
            limits: what the text tower can read, so that the first cell refuses bad texts too.
        """
        blocks = [ImageBlock(block) for block in self.transformer.blocks()]
        return [ImageStem(self, limits), *blocks, ImageHead(self.ln_post, self.proj)]


class ImageStem(Freezable):
    """First cell of the image tower: patches, class token, positions and the first normalisation.

    Args:
        visual: the tower whose parameters the cell holds.
        limits: what the text tower can read.
    """

    def __init__(self, visual: VisionTransformer, limits: TextLimits) -> None:
        super().__init__()
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre = visual.ln_pre
        self.limits = ImageLimits(visual.conv1.in_channels, visual.image_size, limits)

    def forward(self, inputs: tuple[Tensor, Tensor | None, Tensor | None]) -> ImageBoundary:
        """Turn pixels into patch features; texts ride along.

        Args:
            inputs: images (B, C, S, S) of any floating dtype, computed in that of the parameters;
                tokens (B, T) int64 or None; end (B,) int64 or None.

        Returns:
            patch features (B, N, W), the class token first; tokens; end.

        Raises:
            ValueError: if images or texts are not what the model can read.
        """
        images, tokens, end = inputs
        self.limits.check(images, tokens, end)
        x = self.conv1(images.to(self.conv1.weight.dtype))  # (B, W, S / patch, S / patch)
        x = x.flatten(2).transpose(1, 2)  # (B, N - 1, W)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)  # (B, 1, W)
        x = torch.cat([class_token, x], dim=1) + self.positional_embedding  # (B, N, W)
        return self.ln_pre(x), tokens, end


class ImageBlock(Freezable):
    """A cell of the image tower: one block applied to the patch features.

    Args:
        block: the model's.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: ImageBoundary) -> ImageBoundary:
        """Transform the patch features (B, N, W); tokens and end ride along."""
        x, tokens, end = inputs
        return self.block(x), tokens, end


class ImageHead(Freezable):
    """Last cell of the image tower: the class token, normalised and projected.

    Args:
        ln_post: the model's.
        proj: the model's, (W, E).
    """

    def __init__(self, ln_post: LayerNorm, proj: nn.Parameter) -> None:
        super().__init__()
        self.ln_post = ln_post
        self.proj = proj

    def forward(self, inputs: ImageBoundary) -> ImageBoundary:
        """Give image features (B, E) in place of the patch features; tokens and end ride along."""
        x, tokens, end = inputs
        return cast(Tensor, self.ln_post(x[:, 0]) @ self.proj), tokens, end  # (B, E)
