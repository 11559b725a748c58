"""Text files as bytes, in windows, for language models."""

from __future__ import annotations

from typing import Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from gpipe.training.data_draws import batch_rows, generator
from gpipe.training.data_settings import DataSettings, FilePath


class TextConfig(DataSettings):
    """One or several text files, laid end to end.

    Attributes:
        path: The file, or a list of them.
        context_length: Bytes of a window, T.
        test_fraction: Share of the bytes, from the end, that are the test part.
    """

    name: Literal["text"]
    path: FilePath | list[FilePath]
    context_length: int = Field(default=128, ge=1)
    test_fraction: float = Field(default=0.1, gt=0, le=0.5)


class TextWindows:
    """Windows of T bytes and, as targets, the same windows one byte on.

    The windows of a part lie side by side: an epoch shows every byte once, and leaves out the few at the end that do
    not fill a window.

    Args:
        train: (n,) uint8, at least T + 1.
        test: (n,) uint8, at least T + 1.
        context_length: T.
        test_fraction: The share that :meth:`validation` cuts off the training part.
        seed: The run's seed; batches are drawn by it and the step alone.

    Attributes:
        rows: Windows of the training part.
        test_rows: Windows of the test part.
        vocabulary_size: 256, the values of a byte.
    """

    vocabulary_size = 256

    def __init__(self, train: Tensor, test: Tensor, context_length: int, test_fraction: float, *, seed: int) -> None:
        generator(seed, 0, 0)  # refuses a bad seed now
        for part, values in (("training", train), ("held-out", test)):
            if len(values) <= context_length:
                raise ValueError(
                    f"context_length: expected at most {max(len(values) - 1, 0)}, one less than the bytes of the "
                    f"{part} part, got {context_length}: choose a shorter context or give more text"
                )
        self.train, self.test = train, test
        self.context_length = context_length
        self.test_fraction = test_fraction
        self.seed = seed
        self.rows = (len(train) - 1) // context_length
        self.test_rows = (len(test) - 1) // context_length

    def batch(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Batch number ``step``: inputs and targets, (rows, T) int64 each, values 0 to 255.

        Raises:
            ValueError: If ``rows`` is below 1 or above the windows of the training part.
        """
        return self._windows(self.train, batch_rows(self.seed, step, rows, self.rows))

    def test_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The given windows of the test part, in the form of :meth:`batch`."""
        return self._windows(self.test, rows)

    def _windows(self, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        places = rows[:, None] * self.context_length + torch.arange(self.context_length + 1)
        windows = values[places].long()  # (rows, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def validation(self) -> TextWindows:
        """The same data with the end of the training part in the test part's place, and left out of training."""
        train, held = _cut(self.train, self.test_fraction)
        return TextWindows(train, held, self.context_length, self.test_fraction, seed=self.seed)


def _cut(values: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    place = len(values) - round(len(values) * fraction)
    return values[:place], values[place:]


def text(config: TextConfig, *, seed: int) -> TextWindows:
    """Read the files.

    Raises:
        ValueError: If a file is missing, or there are too few bytes for a single window in either part.
    """
    paths = config.path if isinstance(config.path, list) else [config.path]
    if not paths:
        raise ValueError("path: expected a text file or a list of text files, got an empty list")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"path: expected a text file, got {path}, which is not one: correct the path")
    values = numpy.concatenate([numpy.fromfile(path, dtype=numpy.uint8) for path in paths])
    train, test = _cut(torch.from_numpy(values), config.test_fraction)
    data = TextWindows(train, test, config.context_length, config.test_fraction, seed=seed)
    return data.validation() if config.evaluate_on == "validation" else data
