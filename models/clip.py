"""CLIP as cells: an image tower and a causal text tower (Radford et al. 2021, arXiv 2103.00020).

The state dict has the published names. ``logit_scale`` belongs to
:class:`gpipe.models.contrastive.ContrastiveLoss` under its published name, so
``model.state_dict() | loss.state_dict()`` is the published whole.
"""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gpipe.models.attention import Activation, LayerNorm, Transformer, check_tower
from gpipe.models.clip_images import ImageTower
from gpipe.models.clip_resnet import ModifiedResNet
from gpipe.models.clip_text import TextBlock, TextHead, TextLimits, TextStem
from gpipe.models.clip_variants import VARIANTS, Name
from gpipe.models.clip_vision import VisionTransformer
from gpipe.models.freezing import Freezable
from gpipe.models.settings import require_choice

Tower = Literal["image", "text"]


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

    Attributes:
        activation: as given. No state dict says it, so those who load weights compare it with that of the weights.

    Raises:
        ValueError: if a setting is out of range or two do not fit together.
    """

    def __init__(
        self,
        visual: ImageTower,
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
        self.activation = activation
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
        return self._in_mode(self.visual.cells(self.limits), self.visual.frozen)

    def _text_cells(self) -> list[nn.Module]:
        stem = TextStem(self.token_embedding, self.positional_embedding, self.limits)
        blocks = [TextBlock(block) for block in self.transformer.blocks()]
        cells = [stem, *blocks, TextHead(self.ln_final, self.text_projection)]
        return self._in_mode(cells, self.transformer.frozen)

    def _in_mode(self, cells: Iterable[nn.Module], frozen: bool) -> list[nn.Module]:
        # Not cell.train(): it would reach the model's own modules, some of which may be kept in eval mode.
        found = [cast(Freezable, cell) for cell in cells]
        for cell in found:
            cell.frozen = frozen
            cell.training = self.training and not frozen
        return [*found]

    def freeze(self, tower: Tower) -> None:
        """Leave a tower as it is from now on, as in locked-image tuning (arXiv 2111.07991).

        Its parameters ask for no gradient, so no optimizer of ``gpipe train`` has state for them, and it stays in eval
        mode whatever ``train()`` says: batch norm keeps its statistics. To be called before the model is wrapped in a
        pipe, whose cells are made then.

        Args:
            tower: ``"image"`` or ``"text"``.

        Raises:
            ValueError: if there is no such tower.
        """
        require_choice("freeze", tower, ("image", "text"))
        if tower == "image":
            self.visual.freeze()
            return
        self.transformer.freeze()
        for parameter in (self.positional_embedding, self.text_projection):
            parameter.requires_grad_(False)
        for module in (self.token_embedding, self.ln_final):
            module.requires_grad_(False)

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
    name: Name | None = None,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    vision_width: int | None = None,
    vision_layers: int | tuple[int, int, int, int] | None = None,
    vision_heads: int | None = None,
    text_width: int | None = None,
    text_layers: int | None = None,
    text_heads: int | None = None,
    embed_dim: int | None = None,
    activation: Activation | None = None,
    context_length: int = 77,
    vocabulary_size: int = 49408,
    in_channels: int = 3,
    dropout: float = 0.0,
    freeze: Tower | None = None,
    weights: str | None = None,
) -> CLIP:
    """A published CLIP by its name, or one of any size; initialised as published, or with the weights of a file.

    ``clip("RN50")`` or ``clip("ViT-B/32")`` are two of the nine published ones. A size given beside the name takes the
    place of the published one; without a name all sizes have to be given.

    Args:
        name: as OpenAI calls it.
        image_size: side S of the square images in pixels; a multiple of ``patch_size``, or of 32 for a ResNet.
        patch_size: side of a square patch in pixels; not for a ResNet, which has none.
        vision_width: features per patch, a multiple of ``vision_heads``; or channels of a ResNet's stem.
        vision_layers: number of blocks of a Vision Transformer, or of each of the four groups of a ResNet.
        vision_heads: attention heads of an image block, or of a ResNet's attention pool.
        text_width: features per token; a multiple of ``text_heads``.
        text_layers: number of blocks of the text tower.
        text_heads: attention heads of a text block.
        embed_dim: E, features of an image and of a text.
        activation: ``"quick_gelu"``, which a name stands for too, or ``"gelu"``. To be stated with sizes of your own,
            and with ``weights``: they are wrong under the other one, and nothing in their file says which is theirs.
        context_length: most tokens of a text.
        vocabulary_size: number of token ids.
        in_channels: C, colour channels of an image.
        dropout: probability of dropping, in training, an attention weight and an element of a residual branch of a
            Transformer. The published models have none.
        freeze: the tower that is not trained, ``"image"`` or ``"text"``; see :meth:`CLIP.freeze`.
        weights: a file to start from; see :func:`gpipe.models.clip_weights.load_weights`.

    Raises:
        TypeError: if a size, or the activation, is missing.
        ValueError: if a setting is out of range or two do not fit together, or the weights do not fit.
    """
    given = {
        "image_size": image_size,
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_layers": vision_layers,
        "vision_heads": vision_heads,
        "text_width": text_width,
        "text_layers": text_layers,
        "text_heads": text_heads,
        "embed_dim": embed_dim,
        "activation": activation,
    }
    sizes = _settings(name, given, weights)
    text = {key: sizes.pop(key) for key in ("text_width", "text_layers", "text_heads", "activation")}
    model = CLIP(
        _image_tower(sizes, text["activation"], in_channels, dropout),
        **text,
        context_length=context_length,
        vocabulary_size=vocabulary_size,
        dropout=dropout,
    )
    if weights is not None:
        from gpipe.models.clip_weights import load_weights  # it reads into the class defined here

        load_weights(weights, model, activation=text["activation"])
    if freeze is not None:
        model.freeze(freeze)
    return model


def _settings(name: Name | None, given: dict[str, Any], weights: str | None) -> dict[str, Any]:
    """What is given, and for the rest what the name stands for."""
    published: dict[str, Any] = {}
    if name is not None:
        require_choice("name", name, VARIANTS)
        published = VARIANTS[name] | ({} if weights else {"activation": "quick_gelu"})
    settings = published | {key: value for key, value in given.items() if value is not None}
    is_resnet = not isinstance(settings.get("vision_layers", 0), int)
    missing = [key for key in given if key not in settings and not (is_resnet and key == "patch_size")]
    if missing:
        remedy = (
            "state the activation the weights were trained with: nothing in their file says so"
            if weights and missing == ["activation"]
            else f"give them, or one of the names {', '.join(repr(known) for known in VARIANTS)}"
        )
        raise TypeError(f"clip: expected a published name or all sizes, given none for {', '.join(missing)}; {remedy}")
    if is_resnet and "patch_size" in settings:
        raise ValueError(
            f"clip: expected no patch_size for a ResNet, given {settings['patch_size']!r} with "
            f"vision_layers={settings['vision_layers']!r}; leave it out, or give one number of layers"
        )
    return settings


def _image_tower(sizes: dict[str, Any], activation: Activation, in_channels: int, dropout: float) -> ImageTower:
    if "patch_size" in sizes:
        return VisionTransformer(**sizes, activation=activation, in_channels=in_channels, dropout=dropout)
    return ModifiedResNet(**sizes, in_channels=in_channels)
