"""AmoebaNet-D as cells (Real et al. 2018, arXiv 1802.01548), as in GPipe's experiments (arXiv 1811.06965).

A cell reads the outputs of the two cells before it. Both go through the boundary as a tuple: the older one is one cell
old, so the next stage needs it next to always, and a way of its own past that stage would save nothing. The auxiliary
logits ride along too; beside the states they are small.
"""

from collections import OrderedDict
from typing import Literal, cast

import torch
from torch import Tensor, nn

from gpipe.models.amoebanet_genotype import NORMAL, REDUCTION, Genotype
from gpipe.models.amoebanet_operations import DropPath, FactorizedReduce, operation, relu_conv_norm
from gpipe.models.images import require_images
from gpipe.models.settings import require_choice, require_counts, require_probability

Stem = Literal["imagenet", "small"]

# What the cells pass on: the latest output (B, C, H, W), the one before it or None, auxiliary logits (B, classes) or
# None.
States = tuple[Tensor, Tensor | None, Tensor | None]

_HALVINGS = {"imagenet": 5, "small": 2}  # by the stem, its reductions and the two between the normal cells
_AUXILIARY = (51, 307)  # channels: 0.4 times Inception's 128 and 768


class ImageStem(nn.Module):
    """First cell: a convolution over the pixels, with batch normalisation.

    Args:
        in_channels: C, of an image.
        channels: channels that go out.
        stem: ``"imagenet"`` halves height and width, ``"small"`` keeps them.
        image_size: the only side of images it takes, in pixels; None takes any that is large enough.
    """

    def __init__(self, in_channels: int, channels: int, stem: Stem, image_size: int | None) -> None:
        super().__init__()
        stride = 2 if stem == "imagenet" else 1
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.smallest = _smallest(stem)
        self.image_size = image_size

    def forward(self, images: Tensor) -> States:
        """Read images (B, C, H, W) of any floating dtype, computed in that of the parameters.

        Raises:
            ValueError: the images are not what the model can read.
        """
        remedy = f"build the model with stem='small', which takes {_smallest('small')} pixels and more"
        channels = self.conv.in_channels
        require_images("AmoebaNet-D", images, channels=channels, smallest=self.smallest, remedy=remedy)
        side = self.image_size
        if side is not None and tuple(images.shape[2:]) != (side, side):
            raise ValueError(
                f"AmoebaNet-D images: expected {side} x {side} pixels, which the auxiliary head was built for, given "
                f"{images.shape[2]} x {images.shape[3]}; resize the images, or build the model with their image_size"
            )
        return self.norm(self.conv(images.to(self.conv.weight.dtype))), None, None


class Cell(nn.Module):
    """One cell of the network.

    Args:
        genotype: its operations.
        current: channels of the latest output.
        before: channels of the output before it.
        channels: of every state inside; a multiple of 4.
        halve_before: whether the output before has twice the height and width of the latest.
        drop_path: probability of dropping, for each row, what an operation other than ``"none"`` gives, in training.
    """

    def __init__(
        self, genotype: Genotype, *, current: int, before: int, channels: int, halve_before: bool, drop_path: float
    ) -> None:
        super().__init__()
        self.genotype = genotype
        self.squeeze = relu_conv_norm(current, channels)
        self.match = FactorizedReduce(before, channels) if halve_before else relu_conv_norm(before, channels)
        self.operations = nn.ModuleList(
            operation(name, channels, genotype.stride if state < 2 else 1) for state, name in genotype.operations
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, inputs: States) -> States:
        """Make the next output (B, channels * states in the output, H / stride, W / stride)."""
        current, before, auxiliary = inputs
        states = [self.squeeze(current), self.match(current if before is None else before)]
        for index in range(0, len(self.operations), 2):
            states.append(self._result(index, states) + self._result(index + 1, states))
        return torch.cat([states[index] for index in self.genotype.output], dim=1), current, auxiliary

    def _result(self, index: int, states: list[Tensor]) -> Tensor:
        state, name = self.genotype.operations[index]
        y: Tensor = self.operations[index](states[state])
        return y if name == "none" else cast(Tensor, self.drop_path(y))


class AuxiliaryHead(nn.Module):
    """A cell that classifies early, in training only, and hands the states on as they are.

    Args:
        channels: of the latest output.
        side: its height and width; at least 5.
        num_classes: number of classes.
    """

    def __init__(self, channels: int, side: int, num_classes: int) -> None:
        super().__init__()
        narrow, wide = _AUXILIARY
        pooled = (side - 5) // 3 + 1
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3),
            nn.Conv2d(channels, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, wide, pooled, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(wide, num_classes),
        )

    def forward(self, inputs: States) -> States:
        """Add the auxiliary logits (B, classes) in training; in eval mode there are none.

        Raises:
            ValueError: there is but one row, of which batch normalisation cannot learn.
        """
        current, before, _ = inputs
        if not self.training:
            return current, before, None
        if current.shape[0] == 1:
            raise ValueError(
                "AmoebaNet-D auxiliary head: expected at least 2 rows in training, for it has one value per row to "
                "normalise, given 1; use larger mini-batches, or fewer chunks"
            )
        return current, before, self.layers(current)


class Classify(nn.Module):
    """Last cell: the mean over the pixels, and a linear layer.

    Args:
        channels: of the latest output.
        num_classes: number of classes.
        dropout: probability of dropping a mean, in training.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, inputs: States) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (B, classes); where there are auxiliary logits, those as well."""
        current, _, auxiliary = inputs
        logits: Tensor = self.fc(self.dropout(torch.relu(current).mean(dim=(2, 3))))
        return logits if auxiliary is None else (logits, auxiliary)


def amoebanet_d(
    layers: int,
    filters: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    stem: Stem = "imagenet",
    aux_head: bool = False,
    image_size: int = 224,
    drop_path: float = 0.0,
    dropout: float = 0.0,
) -> nn.Sequential:
    """AmoebaNet-D (L, D): three groups of L / 3 normal cells with a reduction between them.

    Cells are named ``stem1`` to ``stem3`` (``stem`` where it is small), ``cell1_normal1`` and so on,
    ``cell2_reduction``, ``auxiliary`` where there is one, and ``classify``: L + 6 of them with the stem for ImageNet.
    Channels are D in the first group and double with every reduction. Convolutions start as published, by the variance
    of their outputs.

    As in torchgpipe's benchmark, whose parameter counts these are, the stem for ImageNet has D / 4 channels and its two
    reductions D / 2 and D (in the program of the paper's authors: 32, D / 4 and D / 2), and its convolution pads the
    edge. As in the authors' program, and unlike that benchmark, the stem reads the pixels themselves, not what is left
    of them above zero, and the classifier the mean over all pixels of the last map, after a ReLU. See
    :mod:`gpipe.models.amoebanet_operations` for the pools.

    Args:
        layers: L, normal cells; a multiple of 3.
        filters: D; a multiple of 8.
        num_classes: number of classes.
        in_channels: C, colour channels of an image.
        stem: ``"imagenet"``, for images of 17 pixels a side and more (224 and 331 in the papers), divides both sides
            by 8 before the first normal cell. ``"small"``, for images from 3 pixels on, is a convolution to D channels
            that keeps the size, as for CIFAR-10 in the paper.
        aux_head: whether a second classifier reads the output of the second group; then, in training, the model gives
            (logits, auxiliary logits). See :class:`gpipe.models.classification.ClassificationLoss`.
        image_size: side of the images in pixels; counts only with ``aux_head``, which fits one size.
        drop_path: probability of dropping, for each row and in training, what an operation of a cell gives. The paper
            raises it over the training: see :class:`gpipe.models.amoebanet_operations.DropPath`.
        dropout: probability of dropping an input of the last layer, in training.

    Returns:
        the cells; the first takes images (B, C, H, W), the last gives logits (B, classes).

    Raises:
        ValueError: a setting is out of range.
    """
    _check(layers, filters, num_classes, in_channels, stem, image_size)
    require_probability("drop_path", drop_path)
    require_probability("dropout", dropout)
    current = before = filters // 4 if stem == "imagenet" else filters
    halved = False
    first = ImageStem(in_channels, current, stem, image_size if aux_head else None)
    cells: dict[str, nn.Module] = {"stem1" if stem == "imagenet" else "stem": first}
    for name, genotype, channels in _plan(layers // 3, filters, stem):
        if aux_head and name == "cell4_reduction":
            cells["auxiliary"] = AuxiliaryHead(current, _auxiliary_side(image_size, stem), num_classes)
        cells[name] = Cell(
            genotype, current=current, before=before, channels=channels, halve_before=halved, drop_path=drop_path
        )
        before, current, halved = current, channels * len(genotype.output), genotype is REDUCTION
    cells["classify"] = Classify(current, num_classes, dropout)
    model = nn.Sequential(OrderedDict(cells))
    _initialise(model)
    return model


def _plan(normal_cells: int, filters: int, stem: Stem) -> list[tuple[str, Genotype, int]]:
    """Name, genotype and channels of every cell between the stem's convolution and the classifier."""
    plan = [("stem2", REDUCTION, filters // 2), ("stem3", REDUCTION, filters)] if stem == "imagenet" else []
    for group, width in ((1, filters), (3, 2 * filters), (5, 4 * filters)):
        if group > 1:
            plan.append((f"cell{group - 1}_reduction", REDUCTION, width))
        plan += [(f"cell{group}_normal{number}", NORMAL, width) for number in range(1, normal_cells + 1)]
    return plan


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _smallest(stem: str) -> int:
    """The smallest side of which no reduction sees less than two pixels."""
    return (1 << _HALVINGS[stem] - 1) + 1


def _auxiliary_side(image_size: int, stem: Stem) -> int:
    """Side of the map that the auxiliary head reads, after all halvings but one."""
    divisor = 1 << _HALVINGS[stem] - 1
    if image_size <= 4 * divisor:
        raise ValueError(
            f"expected image_size to be at least {4 * divisor + 1} with aux_head=True and stem={stem!r}, because the "
            f"auxiliary head reads 5 x 5 pixels of a map {divisor} times smaller, given {image_size}; use larger "
            "images, or set aux_head=False"
        )
    return -(-image_size // divisor)


def _check(layers: int, filters: int, num_classes: int, in_channels: int, stem: Stem, image_size: int) -> None:
    require_choice("stem", stem, _HALVINGS)
    require_counts(
        layers=layers, filters=filters, num_classes=num_classes, in_channels=in_channels, image_size=image_size
    )
    reasons = {3: "as many normal cells in each of three groups", 8: "the narrowest convolution has an eighth of them"}
    for name, value, divisor in (("layers", layers, 3), ("filters", filters, 8)):
        if value % divisor:
            below = value // divisor * divisor
            nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
            raise ValueError(
                f"expected {name} to be a multiple of {divisor}, {reasons[divisor]}, given {value}; "
                f"set {name} to {nearest}"
            )
