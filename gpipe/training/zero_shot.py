"""Zero-shot classification: the class whose captions are nearest to the image (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from gpipe.training.features import unit


def class_features(captions: Tensor) -> Tensor:
    """One feature per class out of those of its captions, the prompt ensemble.

    Args:
        captions: (C, P, E), the features of P captions of each of C classes.

    Returns:
        (C, E): the captions' features are scaled to length 1, averaged, and the mean is scaled to length 1.
    """
    return unit(unit(captions).mean(dim=1))


def classify(images: Tensor, classes: Tensor) -> Tensor:
    """The class of the highest cosine; of equal ones the first.

    Args:
        images: (N, E) features.
        classes: (C, E) features.

    Returns:
        (N,) int64, from 0 to C - 1.
    """
    return (unit(images) @ unit(classes).T).argmax(dim=1)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of predictions (N,) that equal the labels (N,); N is at least 1.

    Raises:
        ValueError: If there are none, or their numbers differ.
    """
    if predictions.shape != labels.shape or not len(labels):
        raise ValueError(
            f"expected as many predictions as labels, and at least one, got {tuple(predictions.shape)} and "
            f"{tuple(labels.shape)}: give one prediction per label"
        )
    return (predictions == labels).to(torch.float64).mean().item()
