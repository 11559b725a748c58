"""Losses computed by the pipeline: over the whole mini-batch, or micro-batch by micro-batch in the last stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

LossFunction = Callable[[Any, Any], Tensor]


def checked_loss(loss: Any) -> Tensor:
    """``loss`` if it is what backward can start from.

    Raises:
        TypeError: It is no tensor. ValueError: It is no floating-point scalar.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise ValueError(
            f"loss_fn must return one floating-point number, got shape {tuple(loss.shape)} of {loss.dtype}: "
            "reduce it to a mean"
        )
    return loss.reshape(())


def check_scaler(scaler: Any) -> None:
    """Raise a TypeError unless ``scaler`` is None or what scales losses."""
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler, or None, got {type(scaler).__name__}: give "
            "torch.amp.GradScaler(device.type)"
        )


def first_gradient(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor:
    """What the gradients of a loss on ``device`` begin with: one, or the scale of ``scaler``."""
    one = torch.ones((), device=device)
    return one if scaler is None else scaler.scale(one)


class MicroBatchLoss:
    """The head of the last stage: each micro-batch's share of the mini-batch's mean loss.

    A mean over the rows of a micro-batch is weighted by its share of the rows, so that uneven micro-batches are exact.

    Args:
        loss_fn: Called with a micro-batch's output and targets; must be a mean over rows.
        targets: Per micro-batch.
        rows: Per micro-batch its number of rows.
    """

    def __init__(self, loss_fn: LossFunction, targets: Sequence[Any], rows: Sequence[int]) -> None:
        self.module = loss_fn if isinstance(loss_fn, nn.Module) else None
        self._loss_fn = loss_fn
        self._targets = targets
        self._shares = [n / max(sum(rows), 1) for n in rows]

    def __call__(self, micro_batch: int, output: Any) -> Tensor:
        """The share of one micro-batch."""
        loss = checked_loss(self._loss_fn(output, self._targets[micro_batch]))
        return loss if len(self._shares) == 1 else loss * self._shares[micro_batch]
