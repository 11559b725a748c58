"""How good a trained model is, by the measures that its data set allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpipe.training.data import Data
from gpipe.training.data_captions import CaptionedImages
from gpipe.training.data_images import Images
from gpipe.training.data_labelled import LabelledImages
from gpipe.training.data_text import TextWindows
from gpipe.training.data_tokens import Tokenizer
from gpipe.training.features import encode_images, encode_texts, evaluating
from gpipe.training.linear_probe import Labelled, linear_probe
from gpipe.training.retrieval import retrieval
from gpipe.training.text_baselines import gzip_bits, unigram_bits
from gpipe.training.zero_shot import accuracy, caption_features, class_features, classify

PIXELS = 1_000_000  # numbers in the training images up to which raw pixels are probed for comparison

Results = dict[str, dict[str, float]]


def evaluate(model: nn.Module, data: Data, *, batch_size: int = 256) -> Results:
    """Judge a model on the held-out part of its data: the test part, or the validation part if the data say so.

    The model is in eval mode meanwhile and as it was afterwards. What is measured:

    - labelled images, contrastive: ``zero_shot`` with the first caption template (``accuracy``) and with the ensemble
      of all (``ensemble_accuracy``), the same for the data set's own groups of images (``zero_shot_unseen_pairs`` and
      ``zero_shot_seen_pairs`` of the coloured digits, always choosing among all classes), ``text_to_image`` and
      ``image_to_text`` retrieval between the test images and the first template's captions, ``linear_probe`` on the
      image features, and for small images ``raw_pixels``, the same probe on the pixels, to compare with;
    - images with captions: retrieval in both directions;
    - labelled images, classification: ``classification`` accuracy, and ``raw_pixels`` as above; no probe where the
      part it is fitted on has a single class;
    - text: ``language_model``, the mean loss per byte in nats and in bits; to compare with, on the same bytes,
      ``unigram``, the frequencies of bytes in the training part, and ``gzip``.

    Args:
        model: The model itself, not a pipe around it. Contrastive data ask for ``encode_image`` and ``encode_text``;
            classification for logits (B, classes); text for logits (B, T, 256).
        data: What `gpipe.training.data.build_data` gave.
        batch_size: Rows that go through the model at once.

    Returns:
        For every measure its numbers by name. Accuracies and recalls are shares, from 0 to 1.

    Raises:
        ValueError: If the model does not fit the data, or its features are not finite.
        TypeError: If the data set is of a kind that evaluation does not know, or the model gives no tensor.
    """
    if isinstance(data, LabelledImages) and data.task == "classification":
        return _classification(model, data, batch_size)
    if isinstance(data, LabelledImages):
        return _labelled(model, data, batch_size)
    if isinstance(data, CaptionedImages):
        images = encode_images(model, data.test_images, batch_size=batch_size)
        return _retrieval(model, data, images, batch_size)
    if isinstance(data, TextWindows):
        return _text(model, data, batch_size)
    raise TypeError(f"expected data from gpipe.training.data.build_data, got {type(data).__name__}")


def _labelled(model: nn.Module, data: LabelledImages, batch_size: int) -> Results:
    images = encode_images(model, data.test_images, batch_size=batch_size)
    return {
        **_zero_shot(model, data, images, batch_size),
        **_retrieval(model, data, images, batch_size),
        **_probes(model, data, images, batch_size),
    }


def _zero_shot(model: nn.Module, data: LabelledImages, images: Tensor, batch_size: int) -> Results:
    tokenizer = cast(Tokenizer, data.tokenizer)
    captions = caption_features(model, tokenizer, data.classes, data.templates, batch_size=batch_size)  # (C, P, E)
    one = classify(images, class_features(captions[:, :1]))
    ensemble = classify(images, class_features(captions))
    groups = {"": torch.ones_like(one, dtype=torch.bool), **{f"_{name}": g for name, g in data.groups.items()}}
    return {
        f"zero_shot{name}": {
            "accuracy": accuracy(one[rows], data.test_labels[rows]),
            "ensemble_accuracy": accuracy(ensemble[rows], data.test_labels[rows]),
            "images": float(rows.sum()),
        }
        for name, rows in groups.items()
    }


def _retrieval(model: nn.Module, data: LabelledImages | CaptionedImages, images: Tensor, batch_size: int) -> Results:
    texts = encode_texts(model, cast(Tokenizer, data.tokenizer), data.captions, batch_size=batch_size)
    return retrieval(images, texts, data.matches)


def _probes(model: nn.Module, data: LabelledImages, test: Tensor, batch_size: int) -> Results:
    """The probe on the model's features and, where that is cheap, on the pixels."""

    def features(images: Images) -> Tensor:
        return encode_images(model, images, batch_size=batch_size)

    return {**_probe("linear_probe", data, features, test), **_raw_pixels(data)}


def _raw_pixels(data: LabelledImages) -> Results:
    def pixels(images: Images) -> Tensor:
        return images[torch.arange(len(images))]

    if data.rows * data.train_images[torch.tensor([0])].numel() > PIXELS:
        return {}
    return _probe("raw_pixels", data, pixels, pixels(data.test_images))


def _probe(name: str, data: LabelledImages, of: Callable[[Images], Tensor], test: Tensor) -> Results:
    """Logistic regression on features of the images, ``test`` those of the test images; none on a single class."""
    division = data.validation()
    train_labels, test_labels = data.probe_labels()
    fit_labels, choose_labels = division.probe_labels()
    if bool((fit_labels == fit_labels[:1]).all()) or not len(choose_labels):
        return {}
    fit: Labelled = of(division.train_images), fit_labels
    choose: Labelled = of(division.test_images), choose_labels
    return {name: linear_probe((of(data.train_images), train_labels), (test, test_labels), (fit, choose))}


def _classification(model: nn.Module, data: LabelledImages, batch_size: int) -> Results:
    images, labels = data.test_images, data.test_labels
    with evaluating(model) as device:
        chunks = torch.split(torch.arange(len(images)), batch_size)
        logits = torch.cat([_logits(model, images[rows].to(device)) for rows in chunks])
    _check_logits(logits, (len(labels), len(data.classes)))
    right = {"accuracy": accuracy(logits.argmax(dim=1), labels), "images": float(len(labels))}
    return {"classification": right, **_raw_pixels(data)}


def _text(model: nn.Module, data: TextWindows, batch_size: int) -> Results:
    total, values = 0.0, 0
    with evaluating(model) as device:
        for rows in torch.split(torch.arange(data.test_rows), batch_size):
            inputs, targets = data.test_batch(rows)
            logits = _logits(model, inputs.to(device))
            _check_logits(logits, (*targets.shape, data.vocabulary_size))
            loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            total, values = total + loss.item(), values + targets.numel()
    nats = total / values
    judged = data.test[1 : values + 1]  # the windows' targets, end to end
    return {
        "language_model": {"nats_per_byte": nats, "bits_per_byte": nats / math.log(2), "bytes": float(values)},
        "unigram": {"bits_per_byte": unigram_bits(data.train, judged)},
        "gzip": {"bits_per_byte": gzip_bits(judged)},
    }


def _logits(model: nn.Module, inputs: Tensor) -> Tensor:
    logits = model(inputs)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"expected logits from the model, one tensor, got {type(logits).__name__}: let it give them alone in eval "
            "mode"
        )
    return logits.float().cpu()


def _check_logits(logits: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(logits.shape) != shape:
        raise ValueError(
            f"expected logits of shape {shape} from the model, got {tuple(logits.shape)}: "
            "give the model as many outputs as the data set has classes"
        )
    if not logits.isfinite().all():
        raise ValueError(
            "expected finite logits, got NaN or infinity: the training has diverged; lower the learning rate, "
            "or evaluate weights saved earlier"
        )
