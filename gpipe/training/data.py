"""Data sets by name: their configuration, and what the training loop asks of them."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import Field

from gpipe.training.data_captions import CaptionsConfig, captions_csv
from gpipe.training.data_digits import ColouredDigitsConfig, DigitsConfig, coloured_digits, digits
from gpipe.training.data_folders import Cifar10Config, ImageFolderConfig, cifar10, image_folder
from gpipe.training.data_source import PythonSourceConfig, python_source
from gpipe.training.data_text import TextConfig, text

DataConfig = Annotated[
    DigitsConfig
    | ColouredDigitsConfig
    | ImageFolderConfig
    | Cifar10Config
    | CaptionsConfig
    | TextConfig
    | PythonSourceConfig,
    Field(discriminator="name"),
]


class Data(Protocol):
    """Training batches by number; evaluation asks more, of the concrete classes."""

    rows: int
    """Rows of the training part: an epoch."""

    def batch(self, step: int, rows: int) -> tuple[Any, Any]:
        """Inputs and targets of batch number ``step``, of ``rows`` rows, on the CPU; drawn by (seed, step) alone.

        Epochs are permutations laid end to end, so that a batch may run across an epoch's end and is always full.

        Raises:
            ValueError: If ``rows`` is below 1 or above the rows of the training part.
        """
        ...

    def validation(self) -> Data:
        """The same data with a part of the training data in the test part's place, and left out of training."""
        ...


def build_data(config: DataConfig, *, seed: int) -> Data:
    """Read a data set.

    Args:
        config: Which, and its settings.
        seed: The run's seed, at least 0: it decides the batches, never the division into training and test part.

    Raises:
        ValueError: If the data set is not where the configuration says, or is not laid out as expected.
    """
    match config:
        case DigitsConfig():
            return digits(config, seed=seed)
        case ColouredDigitsConfig():
            return coloured_digits(config, seed=seed)
        case ImageFolderConfig():
            return image_folder(config, seed=seed)
        case Cifar10Config():
            return cifar10(config, seed=seed)
        case CaptionsConfig():
            return captions_csv(config, seed=seed)
        case TextConfig():
            return text(config, seed=seed)
        case PythonSourceConfig():
            return python_source(config, seed=seed)
