"""Linear probe: how well logistic regression reads the classes off the features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)  # of C, the inverse of the penalty's weight

Labelled = tuple[Tensor, Tensor]  # features (N, ...) and labels (N,) int64


def linear_probe(
    train: Labelled,
    test: Labelled,
    validation: tuple[Labelled, Labelled],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, float]:
    """Fit scikit-learn's logistic regression (L-BFGS, at most 1000 iterations) and score it on the test part.

    Features are centred and divided by one number, their deviation over all training rows and features. That changes
    no result but the meaning of C, which so becomes the same for features of any size.

    Args:
        train: Features and labels to fit.
        test: Features and labels to score; nothing is chosen by them.
        validation: ``train`` divided, without a row of ``test``: C is fitted on the first and chosen by the second.
        strengths: Values of C to choose from; of equally good ones the smallest is taken.

    Returns:
        ``accuracy`` on the test part and the chosen ``C``.
    """
    with warnings.catch_warnings():
        from sklearn.exceptions import ConvergenceWarning  # slow to import

        warnings.simplefilter("ignore", ConvergenceWarning)  # a C at which the fit does not end is seldom chosen
        scores = {C: _score(*validation, C) for C in sorted(strengths)}
    best = max(scores, key=lambda C: scores[C])
    return {"accuracy": _score(train, test, best), "C": best}


def _score(train: Labelled, test: Labelled, C: float) -> float:
    from sklearn.linear_model import LogisticRegression

    features, held = train[0].flatten(1).double(), test[0].flatten(1).double()
    centre = features.mean(dim=0)
    scale = (features - centre).std().clamp(min=1e-12)
    model: Any = LogisticRegression(C=C, max_iter=1000)
    model.fit(((features - centre) / scale).numpy(), train[1].numpy())
    return float(model.score(((held - centre) / scale).numpy(), test[1].numpy()))
