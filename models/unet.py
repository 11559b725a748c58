"""U-Net (B, C) as cells with long skip connections (Ronneberger et al. 2015, arXiv 1505.04597).

The simplified form of torchgpipe's benchmarks, whose parameter counts it has: padded convolutions without bias,
instance normalisation without parameters, upsampling by repetition.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.images import require_images
from gpipe.models.settings import require_counts, require_probability
from gpipe.skip import Namespace, pop, skippable, stash


class Convolution(nn.Module):
    """A cell: 3 x 3 convolution, dropout of whole channels, instance normalisation, leaky ReLU.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        dropout: probability of dropping a channel, in training.
    """

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.dropout = nn.Dropout2d(dropout)
        self.norm = nn.InstanceNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, inputs, H, W) to (B, outputs, H, W)."""
        return F.leaky_relu(self.norm(self.dropout(self.conv(x))), 0.01)


class FirstConvolution(Convolution):
    """The first cell, which refuses images that the model cannot read.

    Args:
        inputs: channels of an image.
        outputs: channels that go out.
        dropout: see :class:`Convolution`.
        depth: how often the model halves height and width.
    """

    def __init__(self, inputs: int, outputs: int, dropout: float, depth: int) -> None:
        super().__init__(inputs, outputs, dropout)
        self.depth = depth

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, inputs, H, W) of any floating dtype to (B, outputs, H, W).

        Raises:
            ValueError: the images are not what the model can read.
        """
        smallest = 2**self.depth
        remedy = f"build the model with a smaller depth than {self.depth}"
        require_images("U-Net", images, channels=self.conv.in_channels, smallest=smallest, remedy=remedy)
        if max(images.shape[2:]) < 2 * smallest:
            raise ValueError(
                f"U-Net images: expected at least one side of {2 * smallest} pixels, because instance normalisation "
                f"needs two pixels at the bottom, given {images.shape[2]} x {images.shape[3]}; enlarge the images, or "
                f"{remedy}"
            )
        return super().forward(images.to(self.conv.weight.dtype))


@skippable(stash=["features"])
class Down(nn.Module):
    """A cell that stashes what an encoder level gave, and halves its height and width."""

    def forward(self, x: Tensor) -> Generator[stash, None, Tensor]:
        """From (B, C, H, W) to (B, C, floor(H / 2), floor(W / 2)), by the maximum."""
        yield stash("features", x)
        return F.max_pool2d(x, 2)


@skippable(pop=["features"])
class Up(nn.Module):
    """A cell that doubles height and width and appends what the encoder level of that size stashed."""

    def forward(self, x: Tensor) -> Generator[pop, Tensor, Tensor]:
        """From (B, C, h, w) to (B, C + C', H, W), the size of the features; a missing edge is padded with zeros."""
        features = yield pop("features")
        x = F.interpolate(x, scale_factor=2.0)
        missing = [large - small for large, small in zip(features.shape[2:], x.shape[2:], strict=True)]
        return torch.cat([F.pad(x, (0, missing[1], 0, missing[0])), features], dim=1)


def unet(
    *,
    depth: int = 5,
    num_convs: int = 5,
    base_channels: int = 64,
    in_channels: int = 3,
    out_channels: int = 1,
    dropout: float = 0.1,
) -> nn.Sequential:
    """U-Net (B, C): an encoder of ``depth`` levels, a bottleneck, and a decoder that reads every level again.

    Level i, from 0, of the encoder has C 2^i channels and that of the decoder gives half as many; the bottleneck has
    C 2^depth inside and gives half as many. Cells are named ``encoder1_conv1``, ..., ``encoder1_down``, ...,
    ``bottleneck_conv1``, ..., ``decoder5_up``, ``decoder5_conv1``, ..., ``segment``; each convolution is a cell.

    Args:
        depth: levels; images need 2^depth pixels a side, one of the sides twice as many.
        num_convs: B, convolutions of a level.
        base_channels: C; even.
        in_channels: channels of an image.
        out_channels: channels of the output.
        dropout: probability of dropping a channel after a convolution, in training.

    Returns:
        the cells; the first takes images (B, in_channels, H, W), the last gives (B, out_channels, H, W).

    Raises:
        ValueError: a setting is out of range.
    """
    require_counts(
        depth=depth,
        num_convs=num_convs,
        base_channels=base_channels,
        in_channels=in_channels,
        out_channels=out_channels,
    )
    if base_channels % 2:
        raise ValueError(
            f"expected base_channels to be even, for the last level gives half as many, given {base_channels}; "
            f"set base_channels to {base_channels + 1}"
        )
    require_probability("dropout", dropout)
    namespaces = [Namespace() for _ in range(depth)]
    widths = [base_channels * 2**level for level in range(depth)]
    bottom = [widths[-1]] + [2 * widths[-1]] * (num_convs - 1) + [widths[-1]]
    plain = partial(Convolution, dropout=dropout)
    first = partial(FirstConvolution, dropout=dropout, depth=depth)
    cells: dict[str, nn.Module] = {}
    for i, (before, width) in enumerate(pairwise([in_channels, *widths]), start=1):
        cells |= _convolutions(f"encoder{i}", [before] + [width] * num_convs, first if i == 1 else plain, plain)
        cells[f"encoder{i}_down"] = _isolated(Down(), namespaces[i - 1])
    cells |= _convolutions("bottleneck", bottom, plain, plain)
    for i, width in reversed(list(enumerate(widths, start=1))):
        cells[f"decoder{i}_up"] = _isolated(Up(), namespaces[i - 1])
        cells |= _convolutions(f"decoder{i}", [2 * width] + [width // 2] * num_convs, plain, plain)
    cells["segment"] = nn.Conv2d(base_channels // 2, out_channels, 1, bias=False)
    return nn.Sequential(OrderedDict(cells))


_Make = Callable[[int, int], nn.Module]


def _convolutions(level: str, channels: list[int], first: _Make, other: _Make) -> dict[str, nn.Module]:
    """Convolutions from each of ``channels`` to the next."""
    made = [(first if i == 0 else other)(*pair) for i, pair in enumerate(pairwise(channels))]
    return {f"{level}_conv{number}": cell for number, cell in enumerate(made, start=1)}


def _isolated(cell: Any, namespace: Namespace) -> nn.Module:
    """``cell.isolate(namespace)``, which `skippable` adds unseen by type checkers."""
    isolated: nn.Module = cell.isolate(namespace)
    return isolated
