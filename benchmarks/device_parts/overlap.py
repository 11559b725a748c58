"""Steps on simulated accelerators, whose kernels take the seconds they are given, beside ``gpipe.simulate``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.device_parts.bench import Bench, CannotRun, part
from gpipe.costs import StageCost
from gpipe.schedules import builder
from gpipe.testing import accelerators

MS = 1e-3
MANY = 1e15  # bytes a second: a link that takes its latency alone
UNEVEN = (0.6, 1.0, 0.8, 1.0, 0.7, 1.0, 0.9, 0.5)
WIDTH = 8


@dataclass(frozen=True)
class Case:
    """What is run.

    Attributes:
        stages: Each on a device of its own.
        micro_batches: So many.
        schedule: By name.
        even: Whether all stages take as long.
        copy: Seconds of every copy between devices.
        forward: Seconds of a forward of the longest stage; a backward takes twice as long.
    """

    stages: int
    micro_batches: int
    schedule: str
    even: bool
    copy: float
    forward: float = 20 * MS

    @property
    def costs(self) -> list[StageCost]:
        """Of every stage: as much for the input's gradient and for the weight's as for forward."""
        shares = [1.0] * self.stages if self.even else [UNEVEN[k % len(UNEVEN)] for k in range(self.stages)]
        each = [share * self.forward for share in shares]
        return [StageCost(seconds, seconds, seconds, boundary_bytes=4 * WIDTH) for seconds in each]

    def simulated(self) -> float:
        """Seconds of the step, as ``gpipe.simulate`` has it."""
        schedule = builder(self.schedule)(self.stages, self.micro_batches)
        return float(gpipe.simulate(schedule, self.costs, links=(self.copy, MANY)).makespan)


def cases(stages: Sequence[int] = (2, 4, 8), copies: Sequence[float] = (0.0, 4 * MS), **options: Any) -> Iterator[Case]:
    """All of them."""
    for k, even, copy, schedule in product(stages, (True, False), copies, ("gpipe", "one_f_one_b", "zero_bubble_h1")):
        yield Case(k, 8, schedule, even, copy, **options)


# --- cells that take the time they are given --------------------------------------------------------------------------


class Taking(torch.autograd.Function):
    """A copy that takes so many seconds forward, and as its gradient so many backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        """The copy."""
        ctx.seconds = backward
        return accelerators.spend(x, forward)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """The same of the gradient."""
        return accelerators.spend(gradient, ctx.seconds), None, None


class Busy(nn.Module):
    """A product whose forward, input gradient and weight gradient take the seconds of a ``StageCost``.

    The weight's seconds stand between the product and its parameter, so that a backward in two parts, which puts off
    what hangs on the product's weight, spends them in its second part.
    """

    def __init__(self, cost: StageCost) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self._cost = cost

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        weight = Taking.apply(self.weight, 0.0, self._cost.weight_gradient_seconds)
        y = nn.functional.linear(x, weight, self.bias)
        taken: Tensor = Taking.apply(y, self._cost.forward_seconds, self._cost.input_gradient_seconds)
        return taken


def measured(case: Case, rounds: int = 3) -> list[float]:
    """Seconds of every counted step, after one of warm-up.

    Raises:
        RuntimeError: The race detector found something.
    """
    devices = [f"sim:{k}" for k in range(case.stages)]
    pipe = gpipe.GPipe(
        nn.Sequential(*map(Busy, case.costs)),
        [1] * case.stages,
        devices=devices,
        chunks=case.micro_batches,
        checkpoint="never",
        seed=0,
    )
    x, y = (
        torch.randn(case.micro_batches, WIDTH, device=devices[0]),
        torch.randn(case.micro_batches, WIDTH, device=devices[-1]),
    )
    accelerators.set_link(MANY, case.copy)

    def step() -> float:
        pipe.zero_grad()
        for device in devices:
            torch.accelerator.synchronize(device)
        start = time.perf_counter()
        pipe.train_step(x, y, nn.functional.mse_loss, loss_over="micro_batch", schedule=case.schedule)
        for device in devices:
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    try:
        accelerators.clear()
        step()
        found = [step() for _ in range(rounds)]
    finally:
        accelerators.set_link(0.0, 0.0)
    if accelerators.reports():
        raise RuntimeError("races: " + "\n".join(accelerators.reports()))
    return found


@part(120)
def simulated_step(bench: Bench) -> None:
    """On simulated accelerators alone: the step over what gpipe.simulate says it takes."""
    if bench.simulated < 2:
        raise CannotRun("needs two simulated accelerators or more: kernels that take the seconds they are given")
    stages = [k for k in (2, 4, 8) if k <= bench.simulated]
    for case in cases(stages[:1]):
        seconds, simulated = statistics.median(measured(case, rounds=1)), case.simulated()
        what = {"K": case.stages, "schedule": case.schedule, "even": case.even, "copy_ms": 1e3 * case.copy}
        bench.say(**what, simulated_ms=1e3 * simulated, measured_ms=1e3 * seconds, over=seconds / simulated)
