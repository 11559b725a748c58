"""The pre-norm Transformer block of CLIP, under its published parameter names."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.freezing import Freezable
from gpipe.models.settings import require_choice, require_counts, require_multiple, require_probability

Activation = Literal["quick_gelu", "gelu"]


class LayerNorm(nn.LayerNorm):
    """Layer normalisation computed in float32 (or wider) that returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x`` (..., W); shape and dtype stay."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the approximate GELU that the published CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to every element of ``x``."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head self-attention; parameters named, laid out and initialised as in ``nn.MultiheadAttention``.

    Args:
        width: W, features per token; a multiple of ``heads``, unless ``head_width`` is given.
        heads: number of heads.
        causal: if true, a token sees itself and those before it only. The mask is no part of the state dict.
        dropout: probability of dropping an attention weight in training.
        head_width: D, features of a head; ``width // heads`` when not given.
    """

    def __init__(
        self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0, head_width: int | None = None
    ) -> None:
        super().__init__()
        if head_width is None:
            require_multiple("width", width, "heads", heads)
        self.heads = heads
        self.head_width = width // heads if head_width is None else head_width
        self.causal = causal
        self.dropout = dropout
        inside = self.heads * self.head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inside, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inside))
        self.out_proj = nn.Linear(inside, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of each row.

        Args:
            x: (B, T, W).
            mask: (B, T) bool, true at tokens and false at padding, which no token sees; None: no padding.

        Returns:
            (B, T, W); at padding it means nothing.
        """
        rows, length, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, T, 3 heads D)
        qkv = qkv.view(rows, length, 3, self.heads, self.head_width)  # (B, T, 3, heads, D)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D)
        seen = None if mask is None else visible(mask, causal=self.causal)
        y = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and seen is None,
        )  # (B, heads, T, D)
        return cast(Tensor, self.out_proj(y.transpose(1, 2).flatten(2)))  # (B, T, W)


def visible(mask: Tensor, *, causal: bool) -> Tensor:
    """Which tokens a token sees, as ``scaled_dot_product_attention`` takes it.

    Args:
        mask: (B, T) bool, true at tokens and false at padding.
        causal: if true, only a token itself and those before it.

    Returns:
        bool: (B, 1, 1, T), or (B, 1, T, T) if causal. There padding sees itself, for a softmax over nothing is NaN.
    """
    if not causal:
        return mask[:, None, None]
    place = torch.arange(mask.shape[1], device=mask.device)
    before, itself = place[:, None] > place, place[:, None] == place  # (T, T) each
    return (before & mask[:, None] | itself)[:, None]


class MLP(nn.Module):
    """The two-layer perceptron of a block.

    Args:
        width: W, features per token.
        activation: ``"quick_gelu"`` or ``"gelu"``.
        hidden: features inside; four times ``width`` when not given.
    """

    def __init__(self, width: int, activation: Activation, hidden: int | None = None) -> None:
        super().__init__()
        require_choice("activation", activation, ACTIVATIONS)
        hidden = 4 * width if hidden is None else hidden
        self.c_fc = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of ``x`` (..., W) by itself; shape stays."""
        return cast(Tensor, self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """A pre-norm residual block: ``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``.

    Args:
        width: W, features per token; a multiple of ``heads``.
        heads: number of attention heads.
        activation: ``"quick_gelu"`` or ``"gelu"``.
        causal: whether attention looks back only.
        dropout: probability of dropping an attention weight, and an element of either branch, in training.
    """

    def __init__(
        self, width: int, heads: int, activation: Activation, *, causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, causal=causal, dropout=dropout)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width, activation)
        self.ln_2 = LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform the tokens of ``x`` (B, T, W); shape stays."""
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + cast(Tensor, self.dropout(self.mlp(self.ln_2(x))))


class Transformer(Freezable):
    """A stack of blocks, which a tower runs one cell at a time; it has no forward of its own.

    Args:
        width: W, features per token; a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads of a block.
        activation: ``"quick_gelu"`` or ``"gelu"``.
        causal: whether attention looks back only.
        dropout: see :class:`Block`.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        activation: Activation,
        *,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            Block(width, heads, activation, causal=causal, dropout=dropout) for _ in range(layers)
        )

    def blocks(self) -> list[Block]:
        """The blocks in the order they run."""
        return [cast(Block, block) for block in self.resblocks]


def check_tower(tower: str, *, width: int, layers: int, heads: int, dropout: float, **counts: int) -> None:
    """Refuse settings no tower can be built from.

    Args:
        tower: prefix of the settings' names in the messages, ``"vision"`` or ``"text"``.
        width: features per token; must be a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads of a block.
        dropout: must be in [0, 1).
        **counts: further settings of the tower that must be positive ints.

    Raises:
        ValueError: naming the setting, what was expected and what was given.
    """
    sizes: dict[str, object] = {f"{tower}_width": width, f"{tower}_layers": layers, f"{tower}_heads": heads}
    require_counts(**sizes, **counts)
    require_multiple(f"{tower}_width", width, f"{tower}_heads", heads)
    require_probability("dropout", dropout)
