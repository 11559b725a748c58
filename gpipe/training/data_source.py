"""The source of Python's own standard library as bytes, for language models: there wherever Python is."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy
import torch
from pydantic import Field
from torch import Tensor

from gpipe.training.data_draws import hold_out
from gpipe.training.data_settings import DataSettings
from gpipe.training.data_text import TextWindows

# Not the library's own, or, as the tests are, not installed everywhere.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class PythonSourceConfig(DataSettings):
    """The ``.py`` files of the standard library of the Python that runs; its tests are left out.

    Attributes:
        context_length: Bytes of a window, T.
        test_fraction: Share of the files that are the test part.
    """

    name: Literal["python_source"]
    context_length: int = Field(default=128, ge=1)
    test_fraction: float = Field(default=0.1, gt=0, le=0.5)


class SourceWindows(TextWindows):
    """Windows of files, of which whole ones are held out: no byte of a file is on both sides.

    Which files does not depend on the run's seed.

    Args:
        files: Path of each file, for a reader, and its bytes; none empty, no two alike.
        context_length: T.
        test_fraction: Share of the files that are held out, and that :meth:`validation` holds out of the rest.
        seed: The run's seed; batches are drawn by it and the step alone.

    Attributes:
        train_files: Paths of the files of the training part, in the order of their bytes.
        test_files: Paths of the files that are held out.

    Raises:
        ValueError: If there are fewer than 2 files, or too few bytes for a single window in either part.
    """

    def __init__(
        self, files: Sequence[tuple[str, bytes]], context_length: int, test_fraction: float, *, seed: int
    ) -> None:
        kept, held = hold_out(torch.zeros(len(files), dtype=torch.int64), test_fraction)
        self._kept = [files[i] for i in kept.tolist()]
        self.train_files = [name for name, _ in self._kept]
        self.test_files = [files[i][0] for i in held.tolist()]
        test = _joined([files[i] for i in held.tolist()])
        super().__init__(_joined(self._kept), test, context_length, test_fraction, seed=seed)

    def validation(self) -> SourceWindows:
        """The same data with a part of the training files in the test files' place, and left out of training."""
        return SourceWindows(self._kept, self.context_length, self.test_fraction, seed=self.seed)


def _joined(files: Sequence[tuple[str, bytes]]) -> Tensor:
    return torch.from_numpy(numpy.frombuffer(b"".join(content for _, content in files), dtype=numpy.uint8).copy())


def source_files(folder: Path) -> list[tuple[str, bytes]]:
    """The ``.py`` files below a folder, ordered by path; empty ones, and all but the first of equal ones, left out.

    Args:
        folder: Where to look; folders below it that are `LEFT_OUT` are not entered.

    Returns:
        Path relative to the folder, with slashes, and bytes of each.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py") if path.is_file()}
    files: list[tuple[str, bytes]] = []
    seen = {hashlib.sha256(b"").digest()}
    for name in sorted(found):
        if not LEFT_OUT.isdisjoint(name.split("/")):
            continue
        content = found[name].read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest not in seen:
            seen.add(digest)
            files.append((name, content))
    return files


def python_source(config: PythonSourceConfig, *, seed: int) -> SourceWindows:
    """Read the standard library's source.

    Raises:
        ValueError: If this Python comes without it, or it is too little for a single window in either part.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = source_files(folder)
    if len(files) < 2:
        raise ValueError(
            f"name: expected the source of Python's standard library in {folder}, found {len(files)} files there: "
            "run a Python that comes with it, or train on files of your own with name: text"
        )
    data = SourceWindows(files, config.context_length, config.test_fraction, seed=seed)
    return data.validation() if config.evaluate_on == "validation" else data
