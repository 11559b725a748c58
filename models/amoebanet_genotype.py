"""The two cells of AmoebaNet-D, as evolution found them (Real et al. 2018, arXiv 1802.01548).

The lists of the authors' program (tensorflow/tpu), which GPipe's experiments ran and whose parameter counts its Table 1
gives. torchgpipe's authors note that the paper itself has the normal cell's output join the states 4, 5 and 6; the
program joins 0, 3, 4 and 6, and so do we.
"""

from dataclasses import dataclass
from typing import Literal

Operation = Literal["none", "conv_1x1", "conv_3x3", "conv_1x7_7x1", "avg_pool_3x3", "max_pool_3x3", "max_pool_2x2"]


@dataclass(frozen=True)
class Genotype:
    """How a cell makes its output from two inputs, states 0 and 1.

    Attributes:
        operations: (state it reads, what it does) for every operation. Two consecutive ones are added up, and their
            sum is the next state: the first pair makes state 2.
        output: the states that, one after the other along the channels, are the cell's output.
        stride: 2 for a cell that halves height and width: operations that read an input have that stride.
    """

    operations: tuple[tuple[int, Operation], ...]
    output: tuple[int, ...]
    stride: Literal[1, 2]


NORMAL = Genotype(
    operations=(
        (1, "conv_1x1"),
        (1, "max_pool_3x3"),
        (1, "none"),
        (0, "conv_1x7_7x1"),
        (0, "conv_1x1"),
        (0, "conv_1x7_7x1"),
        (2, "max_pool_3x3"),
        (2, "none"),
        (1, "avg_pool_3x3"),
        (5, "conv_1x1"),
    ),
    output=(0, 3, 4, 6),
    stride=1,
)

REDUCTION = Genotype(
    operations=(
        (0, "max_pool_2x2"),
        (0, "max_pool_3x3"),
        (2, "none"),
        (1, "conv_3x3"),
        (2, "conv_1x7_7x1"),
        (2, "max_pool_3x3"),
        (3, "none"),
        (1, "max_pool_2x2"),
        (2, "avg_pool_3x3"),
        (3, "conv_1x1"),
    ),
    output=(4, 5, 6),
    stride=2,
)
