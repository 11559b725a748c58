"""GPipe's translation model as cells: a Transformer of L encoder and L decoder layers (arXiv 1811.06965, section 5)."""

from collections import OrderedDict
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.attention import MLP, Attention, LayerNorm, visible
from gpipe.models.settings import require_counts, require_probability
from gpipe.models.token_checks import check_no_text_is_empty, check_tokens
from gpipe.models.token_embedding import TokenEmbedding, TokenScores
from gpipe.models.token_mixers import MixerBlock, shrink_with_depth

# A text and its mask: tokens (B, T) int64, which become features (B, T, W); (B, T) bool, false at padding, or None.
Text = tuple[Tensor, Tensor | None]
# What the cells pass on: source and target.
Texts = tuple[Text, Text]


class CrossAttention(nn.Module):
    """Multi-head attention of one text's tokens to another text.

    Args:
        width: W, features per token of both.
        heads: number of heads.
        head_width: D, features of a head.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(self, width: int, heads: int, *, head_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = head_width
        self.dropout = dropout
        inside = heads * head_width
        self.query_proj = nn.Linear(width, inside)
        self.memory_proj = nn.Linear(width, 2 * inside)
        self.out_proj = nn.Linear(inside, width)
        for layer in (self.query_proj, self.memory_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Let tokens look at the memory.

        Args:
            x: (B, T, W).
            memory: (B, S, W), what is looked at.
            mask: (B, S) bool, false where the memory is padding; None: no padding.

        Returns:
            (B, T, W)
        """
        rows, length, _ = x.shape
        query = self.query_proj(x).view(rows, length, self.heads, self.head_width).transpose(1, 2)
        pair = self.memory_proj(memory).view(rows, memory.shape[1], 2, self.heads, self.head_width)
        key, value = pair.permute(2, 0, 3, 1, 4)  # each (B, heads, S, D)
        seen = None if mask is None else visible(mask, causal=False)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout)  # (B, heads, T, D)
        return cast(Tensor, self.out_proj(y.transpose(1, 2).flatten(2)))  # (B, T, W)


class DecoderBlock(nn.Module):
    """A pre-norm block of three branches: self-attention that looks back, attention to the source, a perceptron.

    Args:
        attention: causal.
        cross: attention to the source.
        width: W, features per token.
        feed_forward: features inside the perceptron.
        dropout: probability of dropping an element of a branch in training.
    """

    def __init__(
        self, attention: Attention, cross: CrossAttention, *, width: int, feed_forward: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm_1 = LayerNorm(width)
        self.attention = attention
        self.norm_2 = LayerNorm(width)
        self.cross = cross
        self.norm_3 = LayerNorm(width)
        self.mlp = MLP(width, "gelu", feed_forward)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Texts) -> Texts:
        """Transform the target's features (B, T, W); the source's (B, S, W) and both masks ride along."""
        (memory, memory_mask), (x, mask) = inputs
        x = x + self.dropout(self.attention(self.norm_1(x), mask))
        x = x + self.dropout(self.cross(self.norm_2(x), memory, memory_mask))
        x = x + self.dropout(self.mlp(self.norm_3(x)))
        return (memory, memory_mask), (x, mask)

    def last_layers(self) -> list[nn.Linear]:
        """The last linear layer of each branch."""
        return [self.attention.out_proj, self.cross.out_proj, self.mlp.c_proj]


class SourceStem(nn.Module):
    """First cell: the source's token ids to features; the target waits, but is checked.

    Args:
        embedding: of the source's tokens.
        context_length: most tokens of a text.
    """

    def __init__(self, embedding: TokenEmbedding, context_length: int) -> None:
        super().__init__()
        self.embedding = embedding
        self.context_length = context_length

    def forward(self, inputs: Texts) -> Texts:
        """Embed the source.

        Args:
            inputs: ((source (B, S) int64, its mask), (target (B, T) int64, its mask)); masks are bool, true at tokens
                and false at padding, or None.

        Returns:
            the same with features (B, S, W) in the source's place.

        Raises:
            ValueError: if texts or masks are not what the model can read.
        """
        (source, source_mask), (target, target_mask) = inputs
        limits = {"context_length": self.context_length, "vocabulary_size": self.embedding.table.num_embeddings}
        check_tokens("translation, source", source, source_mask, **limits)
        check_tokens("translation, target", target, target_mask, **limits)
        check_no_text_is_empty("translation, source", source_mask)
        if len(source) != len(target):
            raise ValueError(
                f"translation: expected as many sources as targets, given {len(source)} and {len(target)}; "
                "pass one target per source"
            )
        return (self.embedding(source, source_mask), source_mask), (target, target_mask)


class EncoderCell(nn.Module):
    """A cell of the encoder: one block applied to the source's features.

    Args:
        block: not causal.
    """

    def __init__(self, block: MixerBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Texts) -> Texts:
        """Transform the source's features (B, S, W); its mask and the target ride along."""
        (x, mask), target = inputs
        return (self.block(x, mask), mask), target


class TargetStem(nn.Module):
    """The cell between encoder and decoder: normalises the source's features and embeds the target.

    Args:
        width: W, features per token.
        embedding: of the target's tokens.
    """

    def __init__(self, width: int, embedding: TokenEmbedding) -> None:
        super().__init__()
        self.norm = LayerNorm(width)
        self.embedding = embedding

    def forward(self, inputs: Texts) -> Texts:
        """Features (B, S, W) of the source and token ids (B, T) of the target to features of both."""
        (memory, memory_mask), (target, mask) = inputs
        return (self.norm(memory), memory_mask), (self.embedding(target, mask), mask)


class TargetHead(nn.Module):
    """Last cell: the target's features to scores of the next token.

    Args:
        scores: of the tokens.
    """

    def __init__(self, scores: TokenScores) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, inputs: Texts) -> Tensor:
        """Logits (B, T, V) of the token after each token of the target; those at padding mean nothing."""
        _, (x, _) = inputs
        return cast(Tensor, self.scores(x))


def translation(
    *,
    layers: int,
    feed_forward: int,
    heads: int,
    width: int = 1024,
    head_width: int = 64,
    vocabulary_size: int = 64_000,
    context_length: int = 1024,
    tied: bool = False,
    dropout: float = 0.1,
) -> nn.Sequential:
    """T(L, H, A) of GPipe's translation experiments: L encoder and L decoder layers, ``2 * layers + 3`` cells.

    It takes ((source (B, S) int64, mask), (target (B, T) int64, mask)), the target beginning with a start token, and
    gives logits (B, T, V): those at a target token depend on the source, it, and the target tokens before it. A mask
    is bool, true at tokens and false at padding, or None.

    Source and target share one vocabulary. Heads have 64 features, however many there are. Blocks are pre-norm.

    The paper makes deep models train by start values of the feed-forward layers that shrink with the number of
    layers, without a formula. Here the last layer of every branch starts smaller by the root of the number of
    branches of its stack, 2 L in the encoder and 3 L in the decoder. (The paper further clips the logits, which
    is no part of the model.)

    Args:
        layers: L, blocks of the encoder and of the decoder each.
        feed_forward: H, features inside a block's perceptron.
        heads: A, attention heads of a block.
        width: W, features per token.
        head_width: features of a head.
        vocabulary_size: V, number of token ids.
        context_length: most tokens of a source, and of a target.
        tied: whether the embeddings of source and target and the output layer have one weight, under three names.
        dropout: probability of dropping, in training, an attention weight and an element of an embedding or of a
            residual branch.

    Raises:
        ValueError: if a setting is out of range.
    """
    require_counts(
        layers=layers,
        feed_forward=feed_forward,
        heads=heads,
        width=width,
        head_width=head_width,
        vocabulary_size=vocabulary_size,
        context_length=context_length,
    )
    require_probability("dropout", dropout)

    def attention(causal: bool) -> Attention:
        return Attention(width, heads, causal=causal, dropout=dropout, head_width=head_width)

    def cross() -> CrossAttention:
        return CrossAttention(width, heads, head_width=head_width, dropout=dropout)

    sizes = {"width": width, "feed_forward": feed_forward}
    source = TokenEmbedding(vocabulary_size, width, dropout)
    target = TokenEmbedding(vocabulary_size, width, dropout)
    if tied:
        target.table.weight = source.table.weight
    encoder = [MixerBlock(attention(causal=False), dropout=dropout, **sizes) for _ in range(layers)]
    decoder = [DecoderBlock(attention(causal=True), cross(), dropout=dropout, **sizes) for _ in range(layers)]
    for stack in (encoder, decoder):
        shrink_with_depth([last for block in stack for last in block.last_layers()])

    cells: OrderedDict[str, nn.Module] = OrderedDict(source=SourceStem(source, context_length))
    cells.update((f"encoder{i}", EncoderCell(block)) for i, block in enumerate(encoder))
    cells["target"] = TargetStem(width, target)
    cells.update((f"decoder{i}", block) for i, block in enumerate(decoder))
    cells["head"] = TargetHead(TokenScores(vocabulary_size, width, source if tied else None))
    return nn.Sequential(cells)
