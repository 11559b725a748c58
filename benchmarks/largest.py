"""The largest model that fits a cap, by estimate as in GPipe's Table 1 and torchgpipe's tables; what it then takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import nn

import gpipe
from benchmarks.contenders import accumulate, buffer_bytes, counted, recorded, tensor_bytes
from benchmarks.harness import Result
from benchmarks.models import Net, amoebanet, transformer
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.partition import Partition
from gpipe.partitioning.solve import Infeasible
from gpipe.queueing import solve_with_queues

CHUNKS = 8
SPEED = Speed(flops=50e9, bytes=10e9)  # a CPU core, roughly; only bytes matter here
STAGES = (1, 2, 4, 8)
MEGA = 2**20


@dataclass(frozen=True)
class Family:
    """Models that grow.

    Attributes:
        about: What they have in common.
        unit: What grows.
        made: The model of a size.
        step: Sizes are multiples of this.
        cap: Bytes of a stage's device.
    """

    about: str
    unit: str
    made: Callable[[int], Net]
    step: int
    cap: int


FAMILIES = {
    "full": (
        Family(
            "Transformer, d 128, sequence 64, batch 32",
            "layers",
            lambda n: transformer(width=128, count=n, sequence=64, rows=32),
            1,
            48 * MEGA,
        ),
        Family(
            "AmoebaNet-D (12, D), small stem, 16 x 16 pixels, batch 32",
            "D",
            lambda n: amoebanet(count=12, filters=n, side=16, rows=32),
            8,
            72 * MEGA,
        ),
    ),
    "tiny": (
        Family(
            "Transformer, d 32, sequence 8, batch 8",
            "layers",
            lambda n: transformer(width=32, count=n, sequence=8, rows=8),
            1,
            MEGA,
        ),
    ),
}


@cache
def _costs(family: Family, size: int, chunks: int) -> list[CellCost]:
    net = family.made(size)
    with torch.device("meta"):
        return estimate(net.module(), net.inputs(net.rows), speed=SPEED, chunks=chunks)


def largest(family: Family, stages: int, *, naive: bool) -> tuple[int, Partition]:
    """The largest size that fits, and its partition; sizes are tried by doubling, then halving.

    Args:
        family: The models.
        stages: Number of devices.
        naive: One mini-batch at once, all kept; otherwise ``CHUNKS`` micro-batches, all re-materialised.
    """
    chunks = 1 if naive else CHUNKS
    size = tensor_bytes(family.made(family.step).batch()[0]) // chunks

    def fitting(count: int) -> Partition | None:
        costs = _costs(family, count * family.step, chunks)
        if len(costs) < stages:
            return None
        try:
            return solve_with_queues(
                costs,
                stages,
                micro_batches=chunks,
                keep=[chunks if naive else 0] * stages,
                memory_limit=family.cap,
                input_bytes=size,
            )
        except Infeasible:
            return None

    low = stages if family.unit == "layers" else 1  # the least there can be
    if fitting(low) is None:
        raise ValueError(f"{family.about}: nothing fits {family.cap / MEGA:.0f} MiB on {stages} devices: raise the cap")
    high = 2 * low
    while fitting(high) is not None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fitting(middle) is not None else (low, middle)
    plan = fitting(low)
    assert plan is not None
    return low * family.step, plan


def measured(net: Net, plan: Partition, naive: bool) -> tuple[int, int]:
    """Parameters of ``net``, and the bytes its fullest stage holds, with Adam's state."""
    module, loss = net.made()
    x, y = net.batch()
    count = sum(p.numel() for p in module.parameters())
    cells = [cell for _, cell in cells_of(module)]
    if naive:
        peaks = counted(accumulate(module, x, y, 1, loss), 0, [module], x)()
    else:
        stages = len(plan.balance)
        pipe = gpipe.GPipe(module, plan.balance, devices=["cpu"] * stages, chunks=CHUNKS, checkpoint="always", seed=0)

        def step() -> None:
            pipe.zero_grad()
            pipe.train_step(x, y, loss, loss_over="micro_batch")

        peaks = recorded(pipe, step, buffer_bytes(module, plan.balance))()
    ends = [sum(plan.balance[:k]) for k in range(len(plan.balance) + 1)]
    state = [2 * _bytes(cells[a:b]) for a, b in pairwise(ends)]
    return count, max(peaks[k] + size for k, size in enumerate(state))


def _bytes(cells: list[nn.Module]) -> int:
    return sum(p.nbytes for cell in cells for p in cell.parameters())


def largest_models(size: str) -> list[Result]:
    """A table for every family: naive, then K = 1, 2, 4, 8 re-materialised."""
    torch.set_num_threads(1)
    results = []
    for family in FAMILIES[size]:
        rows = []
        for stages, naive in ((1, True), *((k, False) for k in STAGES)):
            found, plan = largest(family, stages, naive=naive)
            parameters, taken = measured(family.made(found), plan, naive)
            rows.append(
                [
                    "naive-1" if naive else f"pipeline-{stages}",
                    str(found),
                    f"{parameters / 1e6:.2f} M",
                    f"{max(plan.bytes) / MEGA:.1f}",
                    f"{taken / MEGA:.1f}",
                    f"{100 * (max(plan.bytes) / taken - 1):+.1f} %",
                ]
            )
        columns = ["", family.unit, "parameters", "estimated MiB", "measured MiB", "estimated / measured - 1"]
        note = (
            f"Naive: the mini-batch at once, all kept. Pipelines: M={CHUNKS}, all re-materialised. Found by estimate, "
            "then run: bytes of the fullest stage with parameters, gradients and Adam's state. The loss is not "
            "estimated, and which gradients wait at a slow stage follows from estimated seconds: a stage that takes "
            "more than estimated has more of them. What the paper has at its own sizes is in paper_tables. The peers' "
            "largest models are not searched for; the tables above say what they hold."
        )
        title = f"Largest model in {family.cap / MEGA:.0f} MiB a stage: {family.about}"
        results.append(Result(title, columns, rows, note))
    return results
