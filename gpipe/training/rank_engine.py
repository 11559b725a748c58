"""What trains on one rank of several: a slice of the model and, on the last stage's rank, the loss."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import gpipe
from gpipe.schedules import builder
from gpipe.spans import Spans
from gpipe.timeline import Timeline
from gpipe.training.checking import CheckedLoss, Loss, loss_parameters
from gpipe.training.config import Configuration, PipelineConfig
from gpipe.training.engine import Engine
from gpipe.training.optimizer import build_optimizer
from gpipe.training.vitals import peak_memory
from gpipe.training.world import World

_MOST_STAGES = 8  # of a rank
_LISTS = ("balance", "devices", "checkpoint")


@dataclass(frozen=True)
class Division:
    """Which rank hosts which stages.

    Attributes:
        hosted: Per rank its stages.
        devices: Per rank where they are; None: the accelerator that is there, or the CPU.
    """

    hosted: Sequence[Sequence[int]]
    devices: Sequence[str | None]

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return sum(map(len, self.hosted))


def divide(config: PipelineConfig, ranks: int) -> Division:
    """Stages for the ranks there are: their number decides, whatever ``pipeline.stages`` says.

    Raises:
        ValueError: The configuration says something per stage, for another number of stages, or nothing that ranks
            can do.
    """
    hosted = _hosted(config, ranks)
    stages = sum(map(len, hosted))
    for key in _LISTS:
        value = getattr(config, key)
        if isinstance(value, list) and len(value) != stages:
            raise ValueError(
                f"pipeline.{key}: has {len(value)} entries, one a stage, but {ranks} ranks make {stages} stages; give "
                f"as many entries, leave {key} out, or start other ranks (torchrun --nproc-per-node)"
            )
    devices = config.devices
    if not isinstance(devices, list):
        return Division(hosted, [devices] * ranks)
    for rank, own in enumerate(hosted):
        if len(several := {devices[k] for k in own}) > 1:
            raise ValueError(
                f"pipeline.devices: stages {' and '.join(map(str, own))} are all on rank {rank}, which has one device; "
                f"given {' and '.join(sorted(several))}"
            )
    return Division(hosted, [devices[own[0]] for own in hosted])


def _hosted(config: PipelineConfig, ranks: int) -> list[list[int]]:
    for stages in range(ranks, _MOST_STAGES * ranks + 1, ranks):
        try:
            schedule = builder(config.schedule)(stages, config.chunks)
        except ValueError:  # not for so many stages
            continue
        if len(schedule.workers) == ranks:
            return [sorted({int(action.stage) for action in actions}) for actions in schedule.workers]
    raise ValueError(f"pipeline.schedule: {config.schedule} has no workers for {ranks} ranks; choose another")


class RankEngine(Engine):
    """The stages of this rank.

    Args:
        configuration: The run's.
        model: The whole model, the same on every rank; other ranks' parts are taken out of it.
        loss: The user's; it goes to the last stage's device.
        division: Who hosts what.
        world: The ranks.

    Raises:
        TypeError, ValueError: As `gpipe.DistributedGPipe`. FactoryError: As `Engine`.
    """

    def __init__(
        self, configuration: Configuration, model: nn.Module, loss: Loss, division: Division, world: World
    ) -> None:
        config = configuration.pipeline
        everything = [*model.named_parameters(), *loss_parameters(loss)]
        build_optimizer(configuration.optimizer, everything)  # refused as in one process, though a slice might do
        self._world, self._division = world, division
        self._began = 0.0
        self._pipe = gpipe.DistributedGPipe(
            model,
            config.balance,
            chunks=config.chunks,
            loss_fn=_Targeted(loss),
            schedule=config.schedule,
            loss_over=config.loss_over,
            checkpoint=config.checkpoint,
            deferred_batch_norm=config.deferred_batch_norm,
            seed=configuration.training.seed,
            device=division.devices[world.rank],
        )
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device)  # the process opens no other, which would take memory there
        own = division.hosted[world.rank]
        world.stages = own
        super().__init__(configuration, self._pipe, loss, has_first=0 in own, has_last=division.stages - 1 in own)

    @property
    def device(self) -> torch.device:
        """This rank's."""
        return self._pipe.device

    def described(self) -> str:
        """As described in `Engine`."""
        devices = self._world.gathered(str(self.device))
        places = {k: f"{devices[r]} (rank {r})" for r, own in enumerate(self._division.hosted) for k in own}
        stages = ", ".join(f"{cells} on {places[k]}" for k, cells in enumerate(self._pipe.balance))
        asked = self._configuration.pipeline.stages
        return stages if asked == self._division.stages else f"{stages}, not pipeline.stages = {asked}"

    def timeline(self) -> Timeline:
        """As described in `Engine`; on several hosts, whose clocks differ, each rank's times are from its own start."""
        (own,) = self._pipe.timeline.workers
        gathered = self._world.gathered((socket.gethostname(), self._began, Spans.of(own)))
        one_clock = len({host for host, *_ in gathered}) == 1
        return Timeline(tuple(spans if one_clock else _shifted(spans, began) for _, began, spans in gathered))

    def peak_bytes(self) -> dict[str, int]:
        """As described in `Engine`."""
        every = self._world.gathered(peak_memory([self.device]))
        return {f"rank_{rank}_{place}": size for rank, own in enumerate(every) for place, size in own.items()}

    def clip_gradients(self, max_norm: float) -> None:
        """As described in `Engine`."""
        self._pipe.clip_grad_norm_(max_norm)

    def _named(self) -> list[tuple[str, Parameter]]:
        return [(n, p) for n, p in self._pipe.named_parameters() if not n.startswith("loss_fn.")]

    def _step(self, inputs: Any, targets: Any) -> Tensor:
        self._began = time.perf_counter()
        return self._pipe.train_step(inputs, (targets,))


class _Targeted(CheckedLoss):
    """The loss, given targets that may be None: ranks take those as a tuple of one."""

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        (given,) = targets
        return super().forward(outputs, given)


def _shifted(spans: Spans, start: float) -> Spans:
    """The spans with times from ``start`` on."""
    *action, begins, ends = spans.columns
    return Spans(*action, np.subtract(begins, start), np.subtract(ends, start))
