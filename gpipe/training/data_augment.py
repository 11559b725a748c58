"""Small random distortions of training images."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional


class Augment(BaseModel):
    """How far training images are distorted at random; each image draws its own values, uniformly.

    Attributes:
        degrees: Rotation, at most this much either way.
        scale: Change of size, at most this share either way: 0.15 gives 0.85 to 1.15 times the size.
        shift: Shift along each axis, at most this many pixels either way.
        flip: Whether every second image, on average, is mirrored left to right.
        interpolation: Whether a pixel between pixels is the nearest of them, or a mean, which blurs small images.
        padding: What comes in from outside: black, the edge repeated, or the image mirrored at its edge.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    degrees: float = Field(default=0.0, ge=0, le=180)
    scale: float = Field(default=0.0, ge=0, lt=1)
    shift: float = Field(default=0.0, ge=0)
    flip: bool = False
    interpolation: Literal["nearest", "bilinear"] = "bilinear"
    padding: Literal["zeros", "border", "reflection"] = "zeros"


def augment(images: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """Distort every image of a batch by an affine map of its own.

    The sampling grid is made of elementwise operations alone: a matrix product would make the bits depend on the
    number of threads.

    Args:
        images: (n, C, H, W) float.
        settings: How far.
        generator: Where the numbers come from; five are taken per image, whatever the settings.

    Returns:
        (n, C, H, W) float.
    """
    n, _, height, width = images.shape
    draws = torch.rand(5, n, 1, 1, generator=generator, device="cpu", dtype=torch.float32)
    angle, scale, down, right = 2 * draws[:4] - 1
    angle = angle * (settings.degrees * math.pi / 180)
    scale = 1 + scale * settings.scale
    mirror = torch.where(draws[4] < 0.5, -1.0, 1.0) if settings.flip else torch.ones(n, 1, 1)

    # Pixel distances from the middle of the result, (H, 1) and (W,), and where in the image each one comes from.
    y = torch.arange(height)[:, None] - (height - 1) / 2 - down * settings.shift
    x = torch.arange(width) - (width - 1) / 2 - right * settings.shift
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    source_x, source_y = (cos * x - sin * y) * mirror, sin * x + cos * y
    grid = torch.stack((source_x * (2 / width), source_y * (2 / height)), dim=-1)  # (n, H, W, 2)
    return functional.grid_sample(
        images, grid, mode=settings.interpolation, padding_mode=settings.padding, align_corners=False
    )
