"""CLIP as cells: an image tower and a causal text tower (Radford et al. 2021, arXiv 2103.00020).

The state dict has the published names. ``logit_scale`` belongs to
:class:`gpipe.models.contrastive.ContrastiveLoss` under its published name, so
``model.state_dict() | loss.state_dict()`` is the published whole.
"""

from typing import cast

import torch
from torch import Tensor, nn

from gpipe.models.attention import Activation, LayerNorm, Transformer, check_tower
from gpipe.models.clip_text import TextBlock, TextHead, TextLimits, TextStem
from gpipe.models.clip_vision import VisionTransformer


class CLIP(nn.Module):
    """Two towers whose features are compared: images on one side, texts on the other.

    Args:
        visual: the image tower; its ``embed_dim`` is the text tower's too.
        text_width: W, features per token; a multiple of ``text_heads``.
        text_layers: number of blocks of the text tower.
        text_heads: attention heads of a text block.
        activation: ``"quick_gelu"`` (published weights need it) or ``"gelu"``, of the text tower.
        context_length: most tokens of a text.
        vocabulary_size: number of token ids.
        dropout: probability of dropping in the text tower; see :class:`gpipe.models.attention.Block`.

    Raises:
        ValueError: if a setting is out of range or two do not fit together.
    """

    def __init__(
        self,
        visual: VisionTransformer,
        *,
        text_width: int,
        text_layers: int,
        text_heads: int,
        activation: Activation,
        context_length: int = 77,
        vocabulary_size: int = 49408,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_tower(
            "text",
            width=text_width,
            layers=text_layers,
            heads=text_heads,
            dropout=dropout,
            context_length=context_length,
            vocabulary_size=vocabulary_size,
        )
        self.limits = TextLimits(context_length, vocabulary_size)
        self.visual = visual
        self.transformer = Transformer(text_width, text_layers, text_heads, activation, causal=True, dropout=dropout)
        self.token_embedding = nn.Embedding(vocabulary_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.ln_final = LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, visual.embed_dim))
        self._initialise_text(text_width, text_layers)

    def _initialise_text(self, width: int, layers: int) -> None:
        """As published: residual branches shrink with depth, so that their sum does not grow with it."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        residual = width**-0.5 * (2 * layers) ** -0.5
        for block in self.transformer.blocks():
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)

    def cells(self) -> list[nn.Module]:
        """The model as a sequence of cells, the image tower first.

        The first cell takes (images (B, C, S, S), tokens (B, T) int64, end (B,) int64), the last gives (image
        features (B, E), text features (B, E)). The cells are made anew by each call and hold the model's own
        parameters, each in exactly one cell.
        """
        return [*self._image_cells(), *self._text_cells()]

    def _image_cells(self) -> list[nn.Module]:
        return self._in_mode(self.visual.cells(self.limits))

    def _text_cells(self) -> list[nn.Module]:
        stem = TextStem(self.token_embedding, self.positional_embedding, self.limits)
        blocks = [TextBlock(block) for block in self.transformer.blocks()]
        return self._in_mode([stem, *blocks, TextHead(self.ln_final, self.text_projection)])

    def _in_mode(self, cells: list[nn.Module]) -> list[nn.Module]:
        # Not cell.train(): it would reach the model's own modules, some of which may be kept in eval mode.
        for cell in cells:
            cell.training = self.training
        return cells

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Features of pairs of images and texts, not normalised.

        Args:
            inputs: images (B, C, S, S) of a floating dtype; tokens (B, T) int64, T at most the context
                length; end (B,) int64, the index of each text's end token, whose feature stands for the text.

        Returns:
            image features (B, E) and text features (B, E).

        Raises:
            ValueError: if the inputs are not what the model can read.
        """
        x: object = inputs
        for cell in self.cells():
            x = cell(x)
        return cast(tuple[Tensor, Tensor], x)

    def encode_image(self, images: Tensor) -> Tensor:
        """Features of images alone, not normalised.

        Args:
            images: (B, C, S, S) of a floating dtype.

        Returns:
            (B, E)

        Raises:
            ValueError: if the images are not what the model can read.
        """
        x: object = (images, None, None)
        for cell in self._image_cells():
            x = cell(x)
        features, _, _ = cast(tuple[Tensor, None, None], x)
        return features

    def encode_text(self, tokens: Tensor, end: Tensor) -> Tensor:
        """Features of texts alone, not normalised.

        Args:
            tokens: (B, T) int64, T at most the context length.
            end: (B,) int64, the index of each text's end token.

        Returns:
            (B, E)

        Raises:
            ValueError: if the tokens are not what the model can read.
        """
        x: object = (None, tokens, end)
        for cell in self._text_cells():
            x = cell(x)
        _, features = cast(tuple[None, Tensor], x)
        return features


def clip(
    *,
    image_size: int,
    patch_size: int,
    vision_width: int,
    vision_layers: int,
    vision_heads: int,
    text_width: int,
    text_layers: int,
    text_heads: int,
    embed_dim: int,
    activation: Activation,
    context_length: int = 77,
    vocabulary_size: int = 49408,
    in_channels: int = 3,
    dropout: float = 0.0,
) -> CLIP:
    """A CLIP of any size with a Vision Transformer, initialised as published.

    ViT-B/32, for one, is ``clip(image_size=224, patch_size=32, vision_width=768, vision_layers=12,
    vision_heads=12, text_width=512, text_layers=12, text_heads=8, embed_dim=512, activation="quick_gelu")``.

    Args:
        image_size: side S of the square images in pixels; a multiple of ``patch_size``.
        patch_size: side of a square patch in pixels.
        vision_width: features per patch; a multiple of ``vision_heads``.
        vision_layers: number of blocks of the image tower.
        vision_heads: attention heads of an image block.
        text_width: features per token; a multiple of ``text_heads``.
        text_layers: number of blocks of the text tower.
        text_heads: attention heads of a text block.
        embed_dim: E, features of an image and of a text.
        activation: ``"quick_gelu"`` or ``"gelu"``. It has no default: published weights are wrong without
            ``"quick_gelu"``, and nothing in a state dict says so.
        context_length: most tokens of a text.
        vocabulary_size: number of token ids.
        in_channels: C, colour channels of an image.
        dropout: probability of dropping, in training, an attention weight and an element of a residual
            branch. The published models have none.

    Raises:
        ValueError: if a setting is out of range or two do not fit together.
    """
    visual = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        embed_dim=embed_dim,
        activation=activation,
        in_channels=in_channels,
        dropout=dropout,
    )
    return CLIP(
        visual,
        text_width=text_width,
        text_layers=text_layers,
        text_heads=text_heads,
        activation=activation,
        context_length=context_length,
        vocabulary_size=vocabulary_size,
        dropout=dropout,
    )
