"""scikit-learn's bundled digits, real 8x8 images, as they are and tinted in eight colours."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gpipe.training.data_augment import Augment
from gpipe.training.data_draws import hold_out
from gpipe.training.data_images import TensorImages
from gpipe.training.data_labelled import LabelledImages, Labelling, Part, Parts, Task, stratified
from gpipe.training.data_settings import DataSettings
from gpipe.training.data_tokens import WORD_TOKENIZER

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TINTS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
    "pink": (1.0, 0.5, 0.5),
    "white": (1.0, 1.0, 1.0),
}
DIGIT_TEMPLATES = [
    'a photo of the number: "{}".',  # the MNIST template of CLIP's evaluation
    "a scan of the digit {}.",
    "the handwritten number {}.",
    "somebody wrote a {} here.",
    "a small grey picture of a {}.",
    "this is the digit {}.",
]
COLOUR_TEMPLATES = ["a {}.", "a photo of a {}.", "somebody wrote a {} here.", "this is a {}."]
# Colours that a digit is never shown in, counted on from the digit's own number. Depth 0 is the test's, 20 of the 80
# pairs; each division of the training part for validation takes 10 more.
UNSEEN = ((0, 3), (5,), (6,))


class _Digits(DataSettings):
    augment: Augment | None = Augment(degrees=15.0, scale=0.15, shift=1.0, interpolation="nearest")
    tokenizer: str = WORD_TOKENIZER
    context_length: int = Field(default=16, ge=3)


class DigitsConfig(_Digits):
    """The 1,797 digits; a stratified fifth is the test part."""

    name: Literal["digits"]
    task: Task = "contrastive"
    templates: list[str] = DIGIT_TEMPLATES


class ColouredDigitsConfig(_Digits):
    """Every digit in eight colours; 20 of the 80 (digit, colour) pairs are never shown in training."""

    name: Literal["coloured_digits"]
    task: Literal["contrastive"] = "contrastive"  # what was never shown cannot be a class
    templates: list[str] = COLOUR_TEMPLATES


def digits(config: DigitsConfig, *, seed: int) -> LabelledImages:
    """Build the digits, images (N, 1, 8, 8); class d is named by its numeral, as in CLIP's MNIST evaluation."""
    train, test = _load()
    return _labelled(stratified(train, test), config, [str(digit) for digit in range(10)], None, seed)


def coloured_digits(config: ColouredDigitsConfig, *, seed: int) -> LabelledImages:
    """Build the coloured digits, images (N, 3, 8, 8); class 8 d + c is digit d in colour c, such as 'red seven'."""
    train, test = _load()
    names = [f"{colour} {digit}" for digit in NAMES for colour in TINTS]
    probe = torch.arange(80) // 8  # a linear probe reads the digit: of some pairs it sees nothing in training
    return _labelled(_coloured(train, test, depth=0), config, names, probe, seed)


def _labelled(
    parts: Parts, config: DigitsConfig | ColouredDigitsConfig, classes: list[str], probe: Tensor | None, seed: int
) -> LabelledImages:
    labelling = Labelling(
        classes=classes,
        templates=config.templates,
        task=config.task,
        augment=config.augment,
        mean=[0.5],
        std=[0.5],
        tokenizer=config.tokenizer,
        context_length=config.context_length,
        probe=probe,
    )
    data = LabelledImages(parts, labelling, seed=seed)
    return data.validation() if config.evaluate_on == "validation" else data


def _load() -> tuple[Part, Part]:
    """Training and test part; images are (N, 1, 8, 8) from 0 to 1."""
    from sklearn.datasets import load_digits  # slow to import

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).float().div(16)[:, None]
    labels = torch.from_numpy(bundle.target).long()
    whole, (kept, held) = Part(TensorImages(images), labels), hold_out(labels, 0.2)
    return whole.take(kept), whole.take(held)


def _coloured(train: Part, test: Part, depth: int) -> Parts:
    """Tint both parts: the training part in the pairs it may show, the test part in the unseen pairs as well."""

    def validation() -> Parts:
        kept, held = hold_out(train.labels, 0.2)
        return _coloured(train.take(kept), train.take(held), depth + 1)

    offset = (torch.arange(8) - torch.arange(10)[:, None]) % 8  # (digit, colour)
    before = torch.isin(offset, torch.tensor(sum(UNSEEN[:depth], ())))
    unseen = torch.isin(offset, torch.tensor(sum(UNSEEN[depth : depth + 1], ())))
    seen = ~(before | unseen)
    groups = {"unseen_pairs": unseen.flatten().nonzero().flatten(), "seen_pairs": seen.flatten().nonzero().flatten()}
    return Parts(_tint(train, seen), _tint(test, seen | unseen), validation, groups)


def _tint(part: Part, pairs: Tensor) -> Part:
    """Every image of ``part`` in every colour that ``pairs`` (10, 8) bool allows its digit."""
    row, colour = pairs[part.labels].nonzero(as_tuple=True)
    tints = torch.tensor(list(TINTS.values()))  # (8, 3)
    images = part.images[row] * tints[colour][:, :, None, None]
    return Part(TensorImages(images), part.labels[row] * 8 + colour)
