"""torchvision's ResNets as cells, under torchvision's own weights and keys.

He et al. 2015, arXiv 1512.03385; ResNeXt, arXiv 1611.05431; wide, arXiv 1605.07146. Downsampling bottlenecks have their
stride at the 3 x 3 convolution, as torchvision's do.
"""

from typing import Literal, NamedTuple

import torchvision.models.resnet as published
from torch import Tensor, nn

from gpipe.models.images import require_images
from gpipe.models.settings import require_choice, require_counts


class _Variant(NamedTuple):
    block: type[published.BasicBlock | published.Bottleneck]
    layers: list[int]
    groups: int = 1
    width_per_group: int = 64


_VARIANTS = {
    "resnet18": _Variant(published.BasicBlock, [2, 2, 2, 2]),
    "resnet34": _Variant(published.BasicBlock, [3, 4, 6, 3]),
    "resnet50": _Variant(published.Bottleneck, [3, 4, 6, 3]),
    "resnet101": _Variant(published.Bottleneck, [3, 4, 23, 3]),
    "resnet152": _Variant(published.Bottleneck, [3, 8, 36, 3]),
    "resnext50_32x4d": _Variant(published.Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4),
    "resnext101_32x8d": _Variant(published.Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=8),
    "resnext101_64x4d": _Variant(published.Bottleneck, [3, 4, 23, 3], groups=64, width_per_group=4),
    "wide_resnet50_2": _Variant(published.Bottleneck, [3, 4, 6, 3], width_per_group=128),
    "wide_resnet101_2": _Variant(published.Bottleneck, [3, 4, 23, 3], width_per_group=128),
}

Name = Literal[
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class Stem(nn.Module):
    """First cell: convolution, batch normalisation, ReLU and pooling.

    Args:
        model: whose layers the cell holds.
    """

    def __init__(self, model: published.ResNet) -> None:
        super().__init__()
        self.layers = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        self.channels: int = model.conv1.in_channels

    def forward(self, images: Tensor) -> Tensor:
        """From images (B, 3, H, W) to (B, 64, ceil(H / 4), ceil(W / 4)).

        Raises:
            ValueError: the images are not what the model can read.
        """
        require_images("ResNet", images, channels=self.channels, smallest=1, remedy="leave out empty ones")
        return self.layers(images)  # type: ignore[no-any-return]


class ResNet(published.ResNet):  # type: ignore[misc]  # torchvision has no types
    """torchvision's ResNet with cells: the stem, every residual block, and the head.

    All else is torchvision's: arguments, parameters, keys, start values.
    """

    def cells(self) -> list[nn.Module]:
        """The model as a sequence of cells, made anew by each call; they hold the model's own layers.

        The first cell takes images (B, 3, H, W), the last gives logits (B, classes).
        """
        blocks = [block for layer in (self.layer1, self.layer2, self.layer3, self.layer4) for block in layer]
        stem, head = Stem(self), nn.Sequential(self.avgpool, nn.Flatten(), self.fc)
        for cell in (stem, head):  # not cell.train(): it would reach the layers, some of which may be kept in eval mode
            cell.training = self.training
        return [stem, *blocks, head]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W).

        Raises:
            ValueError: the images are not what the model can read.
        """
        x = images
        for cell in self.cells():
            x = cell(x)
        return x


def resnet(name: Name, *, num_classes: int = 1000, zero_init_residual: bool = False) -> ResNet:
    """A ResNet of torchvision's by name, with start values.

    Published weights are loaded like this:

        model = resnet("resnet50")
        model.load_state_dict(torchvision.models.ResNet50_Weights.IMAGENET1K_V2.get_state_dict())

    Args:
        name: as torchvision calls it.
        num_classes: number of classes.
        zero_init_residual: whether each residual branch starts as zero.

    Raises:
        ValueError: there is no such ResNet, or a setting is out of range.
    """
    require_choice("name", name, _VARIANTS)
    require_counts(num_classes=num_classes)
    variant = _VARIANTS[name]._asdict()
    return ResNet(**variant, num_classes=num_classes, zero_init_residual=zero_init_residual)
