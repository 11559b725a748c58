"""Images with class labels: for classification, or with captions made from templates for contrastive training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gpipe.training.data_augment import Augment, augment
from gpipe.training.data_draws import DRAW, batch_rows, generator, hold_out
from gpipe.training.data_images import Images, Normalised, Subset, normalise
from gpipe.training.data_tokens import Tokenizer, make_tokenizer

Task = Literal["contrastive", "classification"]
Contrastive = tuple[Tensor, Tensor, Tensor]  # images (B, C, H, W), tokens (B, T), end (B,)


@dataclass(frozen=True)
class Part:
    """Images (N) and their labels (N,) int64: the training or the test part of a data set."""

    images: Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Part:
        """The given rows alone."""
        return Part(Subset(self.images, rows), self.labels[rows])


@dataclass(frozen=True)
class Parts:
    """A data set divided into a training and a test part.

    Attributes:
        train: What batches are drawn from.
        test: What the trained model is judged on.
        validation: Divides ``train`` once more, so that choices can be made without a look at ``test``.
        groups: Classes (n,) int64 whose test images evaluation also reports on their own, by name.
    """

    train: Part
    test: Part
    validation: Callable[[], Parts]
    groups: Mapping[str, Tensor] = field(default_factory=dict)


def stratified(train: Part, test: Part) -> Parts:
    """Parts whose validation part is a fifth of every class of the training part."""

    def validation() -> Parts:
        kept, held = hold_out(train.labels, 0.2)
        return stratified(train.take(kept), train.take(held))

    return Parts(train, test, validation)


@dataclass(frozen=True)
class Labelling:
    """What a labelled data set is, besides its images.

    Attributes:
        classes: Names of the classes; label i is ``classes[i]``.
        templates: Captions with ``{}`` where the class goes; the first is the one evaluation uses alone.
        task: Whether a batch holds captions or labels.
        augment: How training images are distorted; None: not at all.
        mean: Per channel, or one for all, subtracted from images of 0 to 1.
        std: Per channel, or one for all, divided by afterwards.
        tokenizer: Dotted path of the tokenizer.
        context_length: Tokens of a caption.
        probe: Per class, the class that a linear probe predicts; None: the class itself.
    """

    classes: Sequence[str]
    templates: Sequence[str]
    task: Task
    augment: Augment | None
    mean: Sequence[float]
    std: Sequence[float]
    tokenizer: str
    context_length: int
    probe: Tensor | None = None

    def __post_init__(self) -> None:
        if self.task == "contrastive" and not self.templates:
            raise ValueError("templates: expected at least one caption template, got none")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(
                    f"templates: expected {{}} exactly once in every template, for the class, got {template!r}"
                )

    def caption(self, label: int, template: int = 0) -> str:
        """The caption of a class."""
        return self.templates[template].replace("{}", self.classes[label])


class LabelledImages:
    """Training batches, test images and captions of a labelled data set.

    Args:
        parts: The images.
        labelling: Class names, templates and settings.
        seed: The run's seed; batches are drawn by it and the step alone.

    Attributes:
        classes: Names of the classes.
        templates: Caption templates; evaluation uses the first, and the ensemble of all.
        test_images: The test images as a model is given them.
        test_labels: (N,) int64.
        captions: The distinct captions of the test images, by the first template.
        matches: (N, 2) int64 pairs (test image, its caption).
        tokenizer: None where the task is classification.
    """

    def __init__(self, parts: Parts, labelling: Labelling, *, seed: int) -> None:
        generator(seed, DRAW, 0)  # refuses a bad seed now
        self.parts = parts
        self.labelling = labelling
        self.seed = seed
        self.task: Task = labelling.task
        self.classes = list(labelling.classes)
        self.templates = list(labelling.templates)
        self.rows = len(parts.train)
        self.test_images: Images = Normalised(parts.test.images, labelling.mean, labelling.std)
        self.test_labels = parts.test.labels
        self.tokenizer: Tokenizer | None = None
        self.captions: list[str] = []
        self.matches = torch.empty(0, 2, dtype=torch.int64)
        if self.task == "contrastive":
            self._caption()

    def _caption(self) -> None:
        """Make the table of all captions' tokens, and the pairs of test images and captions."""
        labelling, shape = self.labelling, (len(self.classes), len(self.templates))
        texts = [labelling.caption(label, template) for label in range(shape[0]) for template in range(shape[1])]
        self.tokenizer = make_tokenizer(labelling.tokenizer, texts, labelling.context_length)
        tokens, end = self.tokenizer(texts)
        self._tokens = tokens.view(*shape, -1)  # (classes, templates, T)
        self._end = end.view(shape)
        present, caption = torch.unique(self.test_labels, return_inverse=True)
        self.captions = [labelling.caption(label) for label in present.tolist()]
        self.matches = torch.stack((torch.arange(len(caption)), caption), dim=1)

    def batch(self, step: int, rows: int) -> tuple[Contrastive | Tensor, Tensor | None]:
        """Batch number ``step``: ((images, tokens, end), None), or (images, labels) for classification.

        Images are (rows, C, H, W) float32, tokens (rows, T), end and labels (rows,) int64.

        Raises:
            ValueError: If ``rows`` is below 1 or above the rows of the training part.
        """
        chosen = batch_rows(self.seed, step, rows, self.rows)
        draws = generator(self.seed, DRAW, step)
        images, labels = self.parts.train.images[chosen], self.parts.train.labels[chosen]
        if self.labelling.augment is not None:
            images = augment(images, self.labelling.augment, draws)
        images = normalise(images, self.labelling.mean, self.labelling.std)
        if self.task == "classification":
            return images, labels
        template = torch.randint(len(self.templates), (rows,), generator=draws, device="cpu")
        return (images, self._tokens[labels, template], self._end[labels, template]), None

    def validation(self) -> LabelledImages:
        """The same data with a part of the training data in the test part's place, and left out of training."""
        return LabelledImages(self.parts.validation(), self.labelling, seed=self.seed)

    @property
    def groups(self) -> dict[str, Tensor]:
        """Groups of test images that evaluation also reports on their own: (N,) bool masks by name."""
        masks = {name: torch.isin(self.test_labels, classes) for name, classes in self.parts.groups.items()}
        return {name: mask for name, mask in masks.items() if mask.any()}

    @property
    def train_images(self) -> Images:
        """The training images as a model is given them, without augmentation."""
        return Normalised(self.parts.train.images, self.labelling.mean, self.labelling.std)

    def probe_labels(self) -> tuple[Tensor, Tensor]:
        """What a linear probe predicts, for the training and the test images: (N,) int64 each."""
        train, test, probe = self.parts.train.labels, self.test_labels, self.labelling.probe
        return (train, test) if probe is None else (probe[train], probe[test])
