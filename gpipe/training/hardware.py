"""Devices to plan for: what their makers publish, and what is assumed of it.

Peaks are those of dense arithmetic: float32 without TF32, bfloat16 on tensor cores. Memory is the published capacity in
units of 10^9 bytes, a few per cent below what a driver reports: room for the runtime itself. Links are those between
two devices of one host, one way (makers publish the sum of both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpipe.partitioning.estimate import Speed
from gpipe.partitioning.problem import Link

Precision = Literal["float32", "bfloat16"]

EFFICIENCY = 0.5
"""The share of every published peak - arithmetic, memory, links - that training is assumed to reach.

An assumption, not a measurement: large Transformers reach 0.4 to 0.6, small layers far less. It is the same for all
devices, so it moves the predicted seconds of all choices alike and hardly their order."""

LATENCY = 10e-6
"""Seconds before a message between two devices of a host begins to arrive; assumed, as no data sheet says."""


@dataclass(frozen=True)
class Device:
    """One device of a plan.

    Attributes:
        name: In words; for a device of this machine the name torch has for it.
        memory: Bytes; None if not limited.
        speed: What it sustains; None for a device of this machine, which is measured instead.
        link: To a device of its kind; None: messages take no time.
        source: Where the numbers come from.
    """

    name: str
    memory: int | None
    speed: Speed | None = None
    link: Link | None = None
    source: str = ""


@dataclass(frozen=True)
class Facts:
    """What a maker publishes of a device.

    Attributes:
        float32: Operations per second; None where the device has no such arithmetic.
        bfloat16: The same.
        memory: Bytes.
        bytes_per_second: From and to its memory.
        link: Bytes per second to another device of the host, one way.
        source: Where this stands.
    """

    float32: float | None
    bfloat16: float | None
    memory: int
    bytes_per_second: float
    link: float
    source: str


_GB = 10**9

FACTS: dict[str, Facts] = {
    "V100-16GB": Facts(15.7e12, None, 16 * _GB, 0.9e12, 150e9, "NVIDIA V100 data sheet, SXM2"),
    "V100-32GB": Facts(15.7e12, None, 32 * _GB, 0.9e12, 150e9, "NVIDIA V100 data sheet, SXM2"),
    "A100-40GB": Facts(19.5e12, 312e12, 40 * _GB, 1.555e12, 300e9, "NVIDIA A100 data sheet, SXM4"),
    "A100-80GB": Facts(19.5e12, 312e12, 80 * _GB, 2.039e12, 300e9, "NVIDIA A100 data sheet, SXM4"),
    "H100": Facts(67e12, 989e12, 80 * _GB, 3.35e12, 450e9, "NVIDIA H100 data sheet, SXM5"),
    "H200": Facts(67e12, 989e12, 141 * _GB, 4.8e12, 450e9, "NVIDIA H200 data sheet, SXM5"),
    "B200": Facts(75e12, 2250e12, 180 * _GB, 7.7e12, 900e9, "NVIDIA HGX B200 data sheet, an eighth of it"),
    "L4": Facts(30.3e12, 121e12, 24 * _GB, 0.3e12, 32e9, "NVIDIA L4 data sheet, PCIe 4.0 x16"),
    "RTX4090": Facts(82.6e12, 165.2e12, 24 * _GB, 1.008e12, 32e9, "NVIDIA Ada white paper, PCIe 4.0 x16"),
    # Half a chip: its matrix units multiply bfloat16 only. Link: Jouppi et al., CACM 63(7), 2020, 656 Gbit/s.
    "TPUv3-core": Facts(None, 61.5e12, 16 * 2**30, 0.45e12, 82e9, "Google Cloud TPU v3 documentation, half a chip"),
}


def known_device(name: str, precision: Precision) -> Device:
    """A device of the table, at the assumed share of its peaks.

    Args:
        name: As in `FACTS`.
        precision: Of the arithmetic.

    Raises:
        ValueError: The device has no arithmetic of this precision.
    """
    facts = FACTS[name]
    peak = facts.float32 if precision == "float32" else facts.bfloat16
    if peak is None:
        raise ValueError(
            f"{name} does not multiply in {precision}: choose other devices, or the other training.precision"
        )
    return Device(
        name,
        facts.memory,
        Speed(EFFICIENCY * peak, EFFICIENCY * facts.bytes_per_second),
        Link(LATENCY, EFFICIENCY * facts.link),
        f"{EFFICIENCY:.0%} of the {precision} peaks in {facts.source}",
    )
