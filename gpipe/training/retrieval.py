"""Retrieval: at which rank the right answer to a query stands."""

from __future__ import annotations

import torch
from torch import Tensor

from gpipe.training.features import unit


def ranks(queries: Tensor, candidates: Tensor, matches: Tensor, *, chunk: int = 1024) -> Tensor:
    """The rank of the best right answer to every query, among all candidates by cosine.

    A query may have several right answers, such as the images that share a caption. Its rank is 1 plus the number of
    *wrong* candidates that score at least as high as the best right one: other right answers do not push it down, and
    a tie with a wrong candidate counts against it. So a model that gives everything the same feature gets the worst
    rank, not the best.

    Args:
        queries: (Q, E) features.
        candidates: (N, E) features.
        matches: (P, 2) int64, the pairs (query, right candidate) in any order.
        chunk: Queries whose scores, (chunk, N), are held in memory at a time.

    Returns:
        (Q,) int64, from 1 to N.

    Raises:
        ValueError: If a query has no right answer.
    """
    unanswered = torch.bincount(matches[:, 0], minlength=len(queries)) == 0
    if unanswered.any():
        raise ValueError(
            f"expected a right answer to every query, got none for {int(unanswered.sum())} of {len(queries)}, "
            f"the first of them query {int(unanswered.nonzero()[0])}: "
            "leave such queries out, or add their pairs to matches"
        )
    queries, candidates = unit(queries), unit(candidates)
    found = []
    for first in range(0, len(queries), chunk):
        scores = queries[first : first + chunk] @ candidates.T  # (chunk, N)
        inside = matches[(matches[:, 0] >= first) & (matches[:, 0] < first + chunk)]
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[inside[:, 0] - first, inside[:, 1]] = True
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        found.append(1 + ((scores >= best) & ~right).sum(dim=1))
    return torch.cat(found)


def summarise(ranks: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10, median and mean of ranks (Q,); of an even number, the median is the middle two's mean."""
    values = ranks.to(torch.float64)
    recall = {f"recall@{k}": (values <= k).to(torch.float64).mean().item() for k in (1, 5, 10)}
    return {**recall, "median_rank": values.quantile(0.5).item(), "mean_rank": values.mean().item()}


def retrieval(images: Tensor, texts: Tensor, matches: Tensor, *, chunk: int = 1024) -> dict[str, dict[str, float]]:
    """Retrieval in both directions.

    Args:
        images: (N, E) features of distinct images.
        texts: (M, E) features of distinct texts.
        matches: (P, 2) int64, the pairs (image, text) that belong together.
        chunk: As for `ranks`.

    Returns:
        The summaries of the directions ``text_to_image`` and ``image_to_text``.
    """
    return {
        "text_to_image": summarise(ranks(texts, images, matches.flip(1), chunk=chunk)),
        "image_to_text": summarise(ranks(images, texts, matches, chunk=chunk)),
    }
