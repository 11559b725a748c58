"""A decoder-only Transformer over tokens as cells, and the one of GPipe's Table 1."""

from collections import OrderedDict
from typing import cast

from torch import Tensor, nn

from gpipe.models.settings import require_counts, require_probability
from gpipe.models.token_checks import check_tokens
from gpipe.models.token_embedding import TokenEmbedding, TokenScores
from gpipe.models.token_mixers import Mixer, MixerBlock, causal_mixer, shrink_with_depth

# What the cells pass on: token features (B, T, W), mask (B, T) or None.
LanguageBoundary = tuple[Tensor, Tensor | None]


class LanguageStem(nn.Module):
    """First cell: token ids to features.

    Args:
        embedding: of the tokens.
        context_length: most tokens of a text.
    """

    def __init__(self, embedding: TokenEmbedding, context_length: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.context_length = context_length

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor | None]) -> LanguageBoundary:
        """Embed the tokens.

        Args:
            inputs: tokens (B, T) int64, or these and a mask (B, T) bool, true at tokens and false at padding.

        Returns:
            token features (B, T, W), mask.

        Raises:
            ValueError: if the tokens or the mask are not what the model can read.
        """
        tokens, mask = (inputs, None) if isinstance(inputs, Tensor) else inputs
        vocabulary_size = self.embedding.table.num_embeddings
        check_tokens(
            "language model", tokens, mask, context_length=self.context_length, vocabulary_size=vocabulary_size
        )
        return self.embedding(tokens, mask), mask


class LanguageBlock(nn.Module):
    """A cell between: one block applied to the token features.

    Args:
        block: causal.
    """

    def __init__(self, block: MixerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: LanguageBoundary) -> LanguageBoundary:
        """Transform the token features (B, T, W); the mask rides along."""
        x, mask = inputs
        return self.block(x, mask), mask


class LanguageHead(nn.Module):
    """Last cell: token features to scores of the next token.

    Args:
        scores: of the tokens.
    """

    def __init__(self, scores: TokenScores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, inputs: LanguageBoundary) -> Tensor:
        """Logits (B, T, V) of the token after each token; those at padding mean nothing."""
        x, _ = inputs
        return cast(Tensor, self.scores(x))


def language_model(
    *,
    vocabulary_size: int,
    width: int,
    layers: int,
    heads: int,
    context_length: int,
    feed_forward: int | None = None,
    mixer: Mixer = "attention",
    tied: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A decoder-only language model: pre-norm blocks between an embedding and an output layer, ``layers + 2`` cells.

    It takes tokens (B, T) int64, or (tokens, mask) with a mask (B, T) bool that is true at tokens and false at
    padding, and gives logits (B, T, V): those at a token depend on it and the tokens before it alone. Positions are
    sines and have no parameters. Deep models train: see ``gpipe.models.token_mixers.shrink_with_depth``.

    Args:
        vocabulary_size: V, number of token ids.
        width: W, features per token; a multiple of ``heads`` where the mixer is attention.
        layers: number of blocks.
        heads: attention heads of a block.
        context_length: most tokens of a text.
        feed_forward: features inside a block's perceptron; four times ``width`` when not given.
        mixer: how a token learns of those before it, ``"attention"`` or ``"hyena"``.
        tied: whether the output layer's weight is the embedding's, one parameter under two names.
        dropout: probability of dropping, in training, an attention weight and an element of the embedding or of a
            residual branch.

    Raises:
        ValueError: if a setting is out of range or two do not fit together.
    """
    feed_forward = 4 * width if feed_forward is None else feed_forward
    require_counts(
        vocabulary_size=vocabulary_size,
        width=width,
        layers=layers,
        heads=heads,
        context_length=context_length,
        feed_forward=feed_forward,
    )
    require_probability("dropout", dropout)

    embedding = TokenEmbedding(vocabulary_size, width, dropout)
    blocks = [
        MixerBlock(
            causal_mixer(mixer, width=width, heads=heads, context_length=context_length, dropout=dropout),
            width=width,
            feed_forward=feed_forward,
            dropout=dropout,
        )
        for _ in range(layers)
    ]
    shrink_with_depth([last for block in blocks for last in block.last_layers()])
    scores = TokenScores(vocabulary_size, width, embedding if tied else None)
    cells: OrderedDict[str, nn.Module] = OrderedDict(stem=LanguageStem(embedding, context_length))
    cells.update((f"layer{i}", LanguageBlock(block)) for i, block in enumerate(blocks))
    cells["head"] = LanguageHead(scores)
    return nn.Sequential(cells)


def gpipe_table1(layers: int) -> nn.Sequential:
    """The Transformer of GPipe's Table 1 (Huang et al. 2019, arXiv 1811.06965) with so many layers.

    The table gives a model dimension of 2048, a feed-forward dimension of 8192, 32 heads, a vocabulary of 32k and
    texts of 1024 tokens, and 282.2, 785.8, 5.3e3, 21.0e3 and 83.9e3 million parameters for 3, 13, 103, 415 and 1663
    layers. To meet these to the digits printed one has to assume: one stack, not two; 32k is 32,000, not 32,768; the
    output layer has a weight of its own, and a bias; so have all layers inside the blocks; two normalisations a
    block, with gain and bias, and one at the end; positions without parameters. The activation, which the counts do
    not tell, is GELU here.

    Args:
        layers: number of blocks, at least 1.

    Raises:
        ValueError: if ``layers`` is below 1.
    """
    return language_model(
        vocabulary_size=32_000, width=2048, layers=layers, heads=32, feed_forward=8192, context_length=1024
    )
