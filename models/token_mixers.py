"""How the tokens of a text learn of each other, by name; and the block that uses it."""

from typing import Literal, cast

from torch import Tensor, nn

from gpipe.models.attention import MLP, Attention, LayerNorm
from gpipe.models.hyena import Hyena
from gpipe.models.settings import require_choice

Mixer = Literal["attention", "hyena"]
MIXERS: tuple[Mixer, ...] = ("attention", "hyena")


def causal_mixer(name: Mixer, *, width: int, heads: int, context_length: int, dropout: float) -> Attention | Hyena:
    """A module of (x (B, T, W), mask (B, T) bool or None) in which a token learns of those before it.

    Args:
        name: ``"attention"``, or ``"hyena"``, whose time grows as T log T instead of T².
        width: W, features per token.
        heads: heads of attention; of no meaning to Hyena.
        context_length: T at most; of no meaning to attention.
        dropout: probability of dropping an attention weight in training; of no meaning to Hyena.

    Raises:
        ValueError: if there is no mixer of that name, or ``heads`` does not divide ``width`` for attention.
    """
    require_choice("mixer", name, MIXERS)
    if name == "hyena":
        return Hyena(width, context_length)
    return Attention(width, heads, causal=True, dropout=dropout)


class MixerBlock(nn.Module):
    """A pre-norm residual block: tokens learn of each other, then each is transformed by itself.

    Args:
        mixer: of (x (B, T, W), mask (B, T) bool or None).
        width: W, features per token.
        feed_forward: features inside the perceptron.
        dropout: probability of dropping an element of either branch in training.
    """

    def __init__(self, mixer: Attention | Hyena, *, width: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(width)
        self.mixer = mixer
        self.norm_2 = LayerNorm(width)
        self.mlp = MLP(width, "gelu", feed_forward)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Transform the tokens of ``x`` (B, T, W); shape stays.

        Args:
            x: (B, T, W).
            mask: (B, T) bool, true at tokens and false at padding; None: no padding.
        """
        x = x + self.dropout(self.mixer(self.norm_1(x), mask))
        return x + cast(Tensor, self.dropout(self.mlp(self.norm_2(x))))

    def last_layers(self) -> list[nn.Linear]:
        """The last linear layer of each branch."""
        return [self.mixer.out_proj, self.mlp.c_proj]


def shrink_with_depth(layers: list[nn.Linear]) -> None:
    """Start values of the last linear layers of all branches of a stack, so that deep stacks train.

    Weights that keep the size of what they are given are divided by the root of the number of branches: the sum of
    all branches is then as large as the embedding, however deep the stack. Otherwise the stream grows, later
    branches are small beside it, and gradients differ from the first layer to the last.

    Args:
        layers: one for each branch.
    """
    for layer in layers:
        nn.init.normal_(layer.weight, std=(layer.in_features * len(layers)) ** -0.5)
        nn.init.zeros_(layer.bias)
