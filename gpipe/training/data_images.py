"""Images as float tensors, in memory or decoded from files when asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


class Images(Protocol):
    """A numbered set of images of one size, with values from 0 to 1."""

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The images of ``rows`` (n,) int64, as (n, C, H, W) float32."""
        ...


class TensorImages:
    """Images held in memory.

    Args:
        pixels: (N, C, H, W), uint8 from 0 to 255 or float32 from 0 to 1.
    """

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        chosen = self.pixels[rows]
        return chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen


class FileImages:
    """Images decoded from files each time they are asked for: RGB, resized and cut to a square.

    Args:
        paths: One file per image.
        size: Height and width in pixels. The shorter side is resized to it, the longer one is cut at both ends.
        origins: Where each path was read from, for error messages, such as "captions.csv, line 7"; default: nothing.
    """

    def __init__(self, paths: Sequence[Path], size: int, origins: Sequence[str] | None = None) -> None:
        self.paths = list(paths)
        self.size = size
        self.origins = list(origins) if origins is not None else [""] * len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Tensor) -> Tensor:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # decoding lets go of the GIL
            return torch.stack(list(pool.map(self._decode, rows.tolist())))

    def _decode(self, row: int) -> Tensor:
        path, origin = self.paths[row], self.origins[row]
        try:
            with Image.open(path) as file:
                image = _eight_bits(file).convert("RGB")
        except (OSError, UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
            where = f"{origin}: " if origin else ""
            raise ValueError(
                f"{where}expected an image file, got {path}, which cannot be decoded ({error}): "
                "repair the file or leave it out"
            ) from error
        return _square(image, self.size)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits in 8, which ``convert`` would cut off at 255 instead.

    Raises:
        OSError: Its values are of a type that says nothing of their range.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if sixteen:
        return Image.fromarray(((numpy.asarray(image).astype(numpy.uint32) + 128) // 257).astype(numpy.uint8))
    if image.mode in ("I", "F"):
        raise OSError(f"pixels of mode {image.mode!r} have no known range; 8 or 16 bits have")
    return image


def _square(image: Image.Image, size: int) -> Tensor:
    """Resize the shorter side to ``size`` and cut the middle out of the longer one: (3, size, size), 0 to 1."""
    width, height = image.size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 255


class Subset:
    """Some of the rows of other images.

    Args:
        images: The whole.
        rows: (n,) int64 rows of ``images``; row i of the subset is row ``rows[i]`` of the whole.
    """

    def __init__(self, images: Images, rows: Tensor) -> None:
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.images[self.rows[rows]]


class Normalised:
    """Images with a mean subtracted and divided by a deviation, per channel: what a model is given.

    Args:
        images: Images with values from 0 to 1.
        mean: C numbers, or one for all channels.
        std: C numbers above 0, or one.
    """

    def __init__(self, images: Images, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images = images
        self.mean = list(mean)
        self.std = list(std)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return normalise(self.images[rows], self.mean, self.std)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract a mean from (n, C, H, W) images and divide by a deviation; both of length C, or 1 for all channels."""
    shape = (1, -1, 1, 1)
    return (images - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
