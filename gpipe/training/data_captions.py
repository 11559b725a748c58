"""Images with a caption each, listed in a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from gpipe.training.data_augment import augment
from gpipe.training.data_draws import DRAW, batch_rows, generator, hold_out
from gpipe.training.data_folders import PhotoSettings
from gpipe.training.data_images import FileImages, Images, Normalised, Subset, normalise
from gpipe.training.data_settings import FilePath
from gpipe.training.data_tokens import Tokenizer, make_tokenizer


class CaptionsConfig(PhotoSettings):
    """A CSV file with a row per (image, caption); an image, and a caption, may have several rows.

    Attributes:
        path: The file, in UTF-8, with the names of the columns in its first line.
        image: The column with the image's path, absolute or relative to the CSV file.
        caption: The column with the caption.
        test_path: Such a file with the test rows; null: a fifth of the images of ``path``.
        image_size: Height and width images are resized and cut to.
    """

    name: Literal["captions_csv"]
    path: FilePath
    image: str = "image"
    caption: str = "caption"
    test_path: FilePath | None = None
    image_size: int = Field(default=224, ge=1)


@dataclass(frozen=True)
class Pairs:
    """Images, texts, and which belong together.

    Attributes:
        images: N distinct images.
        texts: Distinct captions.
        matches: (P, 2) int64, the pairs (image, text).
    """

    images: Images
    texts: Sequence[str]
    matches: Tensor

    def take(self, images: Tensor) -> Pairs:
        """The pairs of the given images alone, and their texts."""
        place = torch.full((len(self.images),), -1)
        place[images] = torch.arange(len(images))
        kept = self.matches[place[self.matches[:, 0]] >= 0]
        used, text = torch.unique(kept[:, 1], return_inverse=True)
        matches = torch.stack((place[kept[:, 0]], text), dim=1)
        return Pairs(Subset(self.images, images), [self.texts[row] for row in used.tolist()], matches)

    def divide(self) -> tuple[Pairs, Pairs]:
        """Four fifths of the images and the fifth that is held out, the same ones every time."""
        kept, held = hold_out(torch.zeros(len(self.images), dtype=torch.int64), 0.2)
        return self.take(kept), self.take(held)


class CaptionedImages:
    """Training batches, test images and their captions.

    Args:
        train: Pairs for training; a batch's rows are pairs.
        test: Pairs to be judged on.
        config: The settings.
        seed: The run's seed; batches are drawn by it and the step alone.

    Attributes:
        test_images: The test images as a model is given them.
        captions: The distinct captions of the test images.
        matches: (P, 2) int64 pairs (test image, its caption).
        tokenizer: Its vocabulary is that of the training captions.
    """

    task: Literal["contrastive"] = "contrastive"

    def __init__(self, train: Pairs, test: Pairs, config: CaptionsConfig, *, seed: int) -> None:
        generator(seed, DRAW, 0)  # refuses a bad seed now
        self.train, self.test, self.config = train, test, config
        self.seed = seed
        self.rows = len(train.matches)
        self.tokenizer: Tokenizer = make_tokenizer(config.tokenizer, train.texts, config.context_length)
        self._tokens, self._end = self.tokenizer(list(train.texts))  # (texts, T), (texts,)
        self.test_images: Images = Normalised(test.images, config.mean, config.std)
        self.captions = list(test.texts)
        self.tokenizer(self.captions)  # a caption too long is refused now, not after the training
        self.matches = test.matches

    def batch(self, step: int, rows: int) -> tuple[tuple[Tensor, Tensor, Tensor], None]:
        """Batch number ``step``: (images (rows, 3, S, S) float32, tokens (rows, T), end (rows,)) and None.

        Raises:
            ValueError: If ``rows`` is below 1 or above the pairs of the training part, or an image cannot be decoded.
        """
        image, text = self.train.matches[batch_rows(self.seed, step, rows, self.rows)].unbind(1)
        images = self.train.images[image]
        if self.config.augment is not None:
            images = augment(images, self.config.augment, generator(self.seed, DRAW, step))
        return (normalise(images, self.config.mean, self.config.std), self._tokens[text], self._end[text]), None

    def validation(self) -> CaptionedImages:
        """The same data with a fifth of the training images in the test part's place, and left out of training."""
        kept, held = self.train.divide()
        return CaptionedImages(kept, held, self.config, seed=self.seed)


def captions_csv(config: CaptionsConfig, *, seed: int) -> CaptionedImages:
    """Read the file, or both; images are decoded when a batch needs them.

    Raises:
        ValueError: If a file is missing, or has rows that are not an image file and a caption; they are named by their
            line numbers.
    """
    if config.test_path is None:
        train, test = _read(config.path, config, "path").divide()
    else:
        train, test = _read(config.path, config, "path"), _read(config.test_path, config, "test_path")
    data = CaptionedImages(train, test, config, seed=seed)
    return data.validation() if config.evaluate_on == "validation" else data


def _read(path: Path, config: CaptionsConfig, key: str) -> Pairs:
    """Read one CSV file."""
    if not path.is_file():
        raise ValueError(f"{key}: expected a CSV file, got {path}, which is not one: correct the path")
    try:
        return _read_rows(path, config, key)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{key}: expected a CSV file in UTF-8, got {path}: {error}; save it as such") from error


def _read_rows(path: Path, config: CaptionsConfig, key: str) -> Pairs:
    images: dict[Path, int] = {}
    texts: dict[str, int] = {}
    pairs: dict[tuple[int, int], None] = {}
    lines, wrong = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file)
        _check_columns(table.fieldnames, config, path, key)
        for row in table:
            fault = _fault(row, path.parent, config)
            if fault:
                wrong.append(f"line {table.line_num}: {fault}")
                continue
            image = (path.parent / row[config.image].strip()).resolve()  # one file is one image, however it is spelt
            if image not in images:
                lines.append(f"{path}, line {table.line_num}")
            caption = row[config.caption].strip()
            pairs[images.setdefault(image, len(images)), texts.setdefault(caption, len(texts))] = None
    _check_rows(wrong, len(images), path, key)
    return Pairs(FileImages(list(images), config.image_size, lines), list(texts), torch.tensor(list(pairs)))


def _check_columns(names: Sequence[str] | None, config: CaptionsConfig, path: Path, key: str) -> None:
    missing = [column for column in (config.image, config.caption) if column not in (names or ())]
    if missing:
        raise ValueError(
            f"{key}: expected the columns {config.image!r} and {config.caption!r} in the first line of {path}, got "
            f"{list(names or ())}: rename the columns, or name yours under data.image and data.caption"
        )


def _fault(row: dict[str, str], folder: Path, config: CaptionsConfig) -> str | None:
    """What is wrong with a row; None: nothing."""
    if None in row:
        return "more fields than columns (a caption with a comma needs quotes)"
    image, caption = row[config.image], row[config.caption]
    if not (image or "").strip() or not (caption or "").strip():
        return "the image's path or the caption is empty"
    if not (folder / image.strip()).is_file():
        return f"there is no file {folder / image.strip()}"
    return None


def _check_rows(wrong: list[str], images: int, path: Path, key: str) -> None:
    if wrong:
        shown = "\n  ".join(wrong[:10] + ([f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []))
        raise ValueError(
            f"{key}: expected an image file and a caption in every row of {path}, got {len(wrong)} bad rows; "
            f"correct or remove them:\n  {shown}"
        )
    if images < 2:
        raise ValueError(f"{key}: expected at least 2 images in {path}, got {images}: add rows")
