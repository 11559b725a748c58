"""What the cells of AmoebaNet-D are made of (Real et al. 2018, arXiv 1802.01548).

All of them map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride)). Two follow the paper where an earlier
public version for PyTorch, torchgpipe's benchmark, does not: "max_pool_3x3" takes the maximum, that one averages;
"max_pool_2x2" keeps the odd row and column at the edge, that one drops them, so that images of 331 pixels, whose maps
have odd sides, do not go through. Neither has parameters: the counts are the same.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.amoebanet_genotype import Operation
from gpipe.models.settings import require_probability

Size = tuple[int, int]


def relu_conv_norm(inputs: int, outputs: int, kernel: Size = (1, 1), stride: Size = (1, 1)) -> nn.Sequential:
    """ReLU, convolution without bias, batch normalisation.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        kernel: height and width, both odd; the edge is padded so that a stride of 1 keeps the size.
        stride: downwards and across.
    """
    padding = kernel[0] // 2, kernel[1] // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(outputs))


class FactorizedReduce(nn.Module):
    """Halves height and width: one half of the channels reads the even pixels, the other the odd ones.

    Args:
        inputs: channels that come in.
        outputs: channels that go out; even.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, inputs, H, W) to (B, outputs, ceil(H / 2), ceil(W / 2))."""
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return cast(Tensor, self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1)))


class DropPath(nn.Module):
    """In training, replaces whole rows by zero and enlarges the others so that the mean stays.

    Args:
        probability: of dropping a row.

    Attributes:
        probability: may be changed between steps: the paper raises it from 0 over the training.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        require_probability("drop_path", probability)
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Drop rows of ``x`` (B, C, H, W)."""
        if not self.training or not self.probability:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)

    def extra_repr(self) -> str:
        """The probability, for printing."""
        return f"{self.probability}"


def _none(channels: int, stride: int) -> nn.Module:
    assert stride == 1, "no cell of AmoebaNet-D has 'none' where it halves its input"
    return nn.Identity()


def _conv_3x3(channels: int, stride: int) -> nn.Module:
    narrow = channels // 4
    return nn.Sequential(
        relu_conv_norm(channels, narrow),
        relu_conv_norm(narrow, narrow, (3, 3), (stride, stride)),
        relu_conv_norm(narrow, channels),
    )


def _conv_1x7_7x1(channels: int, stride: int) -> nn.Module:
    narrow = channels // 4
    return nn.Sequential(
        relu_conv_norm(channels, narrow),
        relu_conv_norm(narrow, narrow, (1, 7), (1, stride)),
        relu_conv_norm(narrow, narrow, (7, 1), (stride, 1)),
        relu_conv_norm(narrow, channels),
    )


_BUILDERS: dict[Operation, Callable[[int, int], nn.Module]] = {
    "none": _none,
    "conv_1x1": lambda channels, stride: relu_conv_norm(channels, channels, stride=(stride, stride)),
    "conv_3x3": _conv_3x3,
    "conv_1x7_7x1": _conv_1x7_7x1,
    "avg_pool_3x3": lambda _, stride: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "max_pool_3x3": lambda _, stride: nn.MaxPool2d(3, stride, padding=1),
    "max_pool_2x2": lambda _, stride: nn.MaxPool2d(2, stride, ceil_mode=True),
}


def operation(name: Operation, channels: int, stride: int) -> nn.Module:
    """An operation of a cell, from ``channels`` to as many.

    Args:
        name: which.
        channels: a multiple of 4: convolutions wider than a pixel work on a quarter of them.
        stride: 1, or 2 to halve height and width.
    """
    return _BUILDERS[name](channels, stride)
