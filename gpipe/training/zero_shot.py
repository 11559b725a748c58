"""Zero-shot classification: the class whose captions are nearest to the image (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gpipe.training.data_tokens import Tokenizer
from gpipe.training.features import encode_texts, unit


def zero_shot_classifier(
    model: nn.Module, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """One feature per class, to be given to `classify` with the features of images.

    Args:
        model: With the methods ``encode_image`` and ``encode_text``.
        tokenizer: The one the model was trained with.
        classes: C names, as they are put into captions.
        templates: P captions with ``{}`` where the name goes, such as `gpipe.models.clip_prompts.IMAGENET_TEMPLATES`.
        batch_size: How many captions go through the model at once.

    Returns:
        (C, E) float32 on the CPU, of length 1.

    Raises:
        ValueError: If there are no classes or templates, a template has not exactly one ``{}``, or the model cannot
            encode texts.
    """
    return class_features(caption_features(model, tokenizer, classes, templates, batch_size=batch_size))


def caption_features(
    model: nn.Module, tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """Features (C, P, E) of the captions of all classes; arguments and errors are those of `zero_shot_classifier`."""
    if not classes or not templates:
        raise ValueError(
            f"expected class names and caption templates, got {len(classes)} and {len(templates)}: "
            "give at least one of each"
        )
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f"expected {{}} exactly once in every template, got {template!r}: it is where the class goes"
            )
    texts = [template.replace("{}", name) for name in classes for template in templates]
    features = encode_texts(model, tokenizer, texts, batch_size=batch_size)
    return features.view(len(classes), len(templates), -1)


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
