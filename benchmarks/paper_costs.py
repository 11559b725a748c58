"""The models and devices of GPipe's and torchgpipe's papers, as costs of cells."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.language_loss import WithLoss
from gpipe.costs import Link
from gpipe.models.amoebanet import amoebanet_d
from gpipe.models.resnet import resnet
from gpipe.models.transformer import gpipe_table1
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.training.hardware import EFFICIENCY, LATENCY, Facts, known_device

PAPERS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "gpipe_paper.yaml").read_text())

P100 = Facts(9.3e12, None, 16 * 10**9, 0.732e12, 16e9, "NVIDIA P100 data sheet, PCIe 3.0 x16")
P40 = Facts(11.76e12, None, 24 * 10**9, 0.346e12, 16e9, "NVIDIA P40 data sheet, PCIe 3.0 x16")


def gpu(facts: Facts) -> tuple[Speed, Link]:
    """At the share of the peaks that ``gpipe plan`` assumes."""
    assert facts.float32 is not None
    speed = Speed(EFFICIENCY * facts.float32, EFFICIENCY * facts.bytes_per_second)
    return speed, (LATENCY, EFFICIENCY * facts.link)


def tpu() -> tuple[Speed, Link]:
    """A core of a TPUv3, at the share of its peaks that ``gpipe plan`` assumes."""
    device = known_device("TPUv3-core", "bfloat16")
    assert device.speed is not None
    assert device.link is not None
    return device.speed, (device.link.latency, device.link.bandwidth)


# --- costs of the papers' models --------------------------------------------------------------------------------------


@cache
def amoebanet(layers: int, filters: int, speed: Speed, rows: int = 1) -> list[CellCost]:
    """The costs of AmoebaNet-D's cells for a micro-batch of so many images of 224 x 224."""
    with torch.device("meta"):
        module = amoebanet_d(layers, filters)
        return estimate(module, torch.empty(rows, 3, 224, 224), speed=speed)


@cache
def resnet101(speed: Speed, rows: int) -> list[CellCost]:
    """The costs of its cells for so many images of 224 x 224."""
    with torch.device("meta"):
        return estimate(resnet("resnet101"), torch.empty(rows, 3, 224, 224), speed=speed)


@cache
def _transformer_cells(speed: Speed) -> tuple[CellCost, CellCost, CellCost]:
    """Embedding, layer and output layer, for one text."""
    with torch.device("meta"):
        *cells, head = gpipe_table1(2)
        module = nn.Sequential(*cells, WithLoss(head))
        first, layer, _, last = estimate(module, torch.zeros(1, 1024, dtype=torch.long), speed=speed)
    return first, layer, last


def transformer(layers: int, speed: Speed) -> list[CellCost]:
    """The costs of a Transformer of GPipe's Table 1 with so many layers, for one text."""
    first, layer, last = _transformer_cells(speed)
    return [first, *[layer] * layers, last]


def parameters(costs: Sequence[CellCost]) -> int:
    """How many a model has."""
    return sum(c.parameter_bytes for c in costs) // 4
