"""Stages that share one accelerator, and the plain loop beside them: the same model, micro-batches and precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import gpipe
from benchmarks.contenders import accumulate
from benchmarks.models import Net, moved
from benchmarks.slices import checkpointed

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """What all contenders on one model have in common."""

    net: Net
    chunks: int
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def batch(self) -> tuple[Any, Any]:
        """Inputs and targets on the device."""
        inputs, targets = self.net.batch()
        return moved(inputs, self.device), moved(targets, self.device)

    def autocast(self) -> torch.autocast:
        """Autocast where the precision is bfloat16: a context, and a decorator."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def autocasting(self, modules: Iterable[nn.Module]) -> None:
        """Let these modules autocast in forward, in whatever thread that runs."""
        for module in modules:
            module.forward = self.autocast()(module.forward)

    def made(self) -> tuple[nn.Module, nn.Module]:
        """Model and loss on the device."""
        with self.device:
            return self.net.made()


def plain(setting: Setting, recompute: bool) -> Step:
    """The loop over the micro-batches, each cell in torch.utils.checkpoint or none."""
    module, loss = checkpointed(setting.net, setting.chunks, setting.device) if recompute else setting.made()
    setting.autocasting([module, loss])
    run = accumulate(module, *setting.batch, setting.chunks, loss)

    def step() -> None:
        loss.zero_grad()
        run()

    return step


def piped(setting: Setting, stages: int, schedule: str, checkpoint: str, balance: Sequence[int] | None = None) -> Step:
    """Our pipe, all of its stages on the device; without ``balance`` it divides the model by itself."""
    module, loss = setting.made()
    x, y = setting.batch
    options: dict[str, Any] = {"devices": [setting.device] * stages, "chunks": setting.chunks, "checkpoint": checkpoint}
    pipe = gpipe.GPipe(module, balance, **options, sample=x if stages > 1 and balance is None else None)

    def step() -> None:
        pipe.zero_grad()
        loss.zero_grad()
        with setting.autocast():
            pipe.train_step(x, y, loss, loss_over="micro_batch", schedule=schedule)

    return step
