"""Labelled images on disk: a folder per class, and CIFAR-10, both read by torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveFloat

from gpipe.training.data_augment import Augment
from gpipe.training.data_draws import hold_out
from gpipe.training.data_images import FileImages, TensorImages
from gpipe.training.data_labelled import LabelledImages, Labelling, Part, Task, stratified
from gpipe.training.data_settings import DataSettings, FilePath
from gpipe.training.data_tokens import WORD_TOKENIZER

PHOTO_TEMPLATES = [
    "a photo of a {}.",
    "a small photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of the {}.",
    "this is a {}.",
]
# Mean and deviation of the images that the published CLIP was trained on.
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]


class PhotoSettings(DataSettings):
    """What data sets of RGB photos share.

    Attributes:
        augment: How training images are distorted; null: not at all.
        mean: Per channel, subtracted from images of 0 to 1.
        std: Per channel, divided by afterwards.
        tokenizer: Dotted path of the tokenizer, called with the training captions and the context length.
        context_length: Tokens of a caption.
    """

    augment: Augment | None = Augment(scale=0.1, flip=True, padding="reflection")
    mean: list[float] = Field(default=MEAN, min_length=3, max_length=3)
    std: list[PositiveFloat] = Field(default=STD, min_length=3, max_length=3)
    tokenizer: str = WORD_TOKENIZER
    context_length: int = Field(default=77, ge=3)


class _Labelled(PhotoSettings):
    task: Task = "contrastive"
    templates: list[str] = PHOTO_TEMPLATES
    path: FilePath


class ImageFolderConfig(_Labelled):
    """A folder that holds one folder of images per class, named as the class.

    Attributes:
        path: The folder.
        test_path: Such a folder with the test images; null: a stratified fifth of ``path``.
        image_size: Height and width images are resized and cut to.
    """

    name: Literal["image_folder"]
    test_path: FilePath | None = None
    image_size: int = Field(default=224, ge=1)


class Cifar10Config(_Labelled):
    """CIFAR-10 in its published Python layout.

    Attributes:
        path: The folder that holds ``cifar-10-batches-py``. Nothing is downloaded.
    """

    name: Literal["cifar10"]


def image_folder(config: ImageFolderConfig, *, seed: int) -> LabelledImages:
    """Find the images and their classes; files are decoded when a batch needs them.

    Raises:
        ValueError: If a folder is missing or empty, the two folders differ in their classes, or a class has too few
            images to be divided.
    """
    train, classes = _read_folder(config.path, config.image_size, "path")
    if config.test_path is None:
        counts = torch.bincount(train.labels, minlength=len(classes))
        if counts.min() < 2:
            raise ValueError(
                f"path: expected at least 2 images of every class, got {int(counts.min())} of "
                f"{classes[int(counts.argmin())]!r} in {config.path}: add images, or give data.test_path"
            )
        kept, held = hold_out(train.labels, 0.2)
        train, test = train.take(kept), train.take(held)
    else:
        test, test_classes = _read_folder(config.test_path, config.image_size, "test_path")
        if test_classes != classes:
            differing = sorted(set(classes) ^ set(test_classes))
            raise ValueError(
                f"test_path: expected the class folders of data.path, but {differing} are in only one of "
                f"{config.path} and {config.test_path}: give both the same class folders"
            )
    names = [name.replace("_", " ") for name in classes]
    return _labelled(train, test, config, names, seed)


def _read_folder(path: Path, size: int, key: str) -> tuple[Part, list[str]]:
    from torchvision.datasets import ImageFolder  # slow to import

    try:
        folder = ImageFolder(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"{key}: expected a folder that holds one folder of images per class, such as "
            f"{path}/cat/1.png and {path}/dog/2.png, got {path}: {error}"
        ) from error
    files, labels = zip(*folder.samples, strict=True)
    images = FileImages([Path(file) for file in files], size)
    return Part(images, torch.tensor(labels, dtype=torch.int64)), list(folder.classes)


def cifar10(config: Cifar10Config, *, seed: int) -> LabelledImages:
    """Read CIFAR-10 into memory; images are (N, 3, 32, 32).

    Raises:
        ValueError: If the files are missing or damaged.
    """
    (train, classes), (test, _) = _read_cifar10(config.path, True), _read_cifar10(config.path, False)
    return _labelled(train, test, config, classes, seed)


def _read_cifar10(path: Path, train: bool) -> tuple[Part, list[str]]:
    from torchvision.datasets import CIFAR10  # slow to import

    try:
        bundle = CIFAR10(path, train=train, download=False)
    except RuntimeError as error:
        raise ValueError(
            f"path: expected a folder that holds {CIFAR10.base_folder}/ with the files data_batch_1 to "
            f"data_batch_5, test_batch and batches.meta of cifar-10-python.tar.gz, got {path}, where they are missing "
            "or damaged: unpack the archive there (nothing is downloaded)"
        ) from error
    pixels = torch.from_numpy(bundle.data).permute(0, 3, 1, 2).contiguous()
    return Part(TensorImages(pixels), torch.tensor(bundle.targets, dtype=torch.int64)), list(bundle.classes)


def _labelled(train: Part, test: Part, config: _Labelled, classes: list[str], seed: int) -> LabelledImages:
    labelling = Labelling(
        classes=classes,
        templates=config.templates,
        task=config.task,
        augment=config.augment,
        mean=config.mean,
        std=config.std,
        tokenizer=config.tokenizer,
        context_length=config.context_length,
    )
    data = LabelledImages(stratified(train, test), labelling, seed=seed)
    return data.validation() if config.evaluate_on == "validation" else data
