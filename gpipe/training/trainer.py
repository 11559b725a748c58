"""One optimizer step, and the state that has to be kept between two of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpipe.loss import checked_loss
from gpipe.rng import cell_seed
from gpipe.training.build import Job, Loss, loss_state
from gpipe.training.errors import RunError
from gpipe.training.optimizer import learning_rate_factor, set_learning_rate
from gpipe.training.saving import FORMAT, Save


class StepResult(NamedTuple):
    """What a step has to tell: its loss, and the learning rate it used."""

    loss: float
    learning_rate: float


class NonFiniteError(RunError):
    """The loss or the weights are no longer numbers."""


class _CheckedLoss(nn.Module):
    """The loss, if it gives a loss, and a number."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """As of the loss.

        Raises:
            RunError: It is no scalar. NonFiniteError: It is no number.
        """
        try:
            loss = checked_loss(self.loss(outputs, targets))
        except (TypeError, ValueError) as error:
            raise RunError(f"loss.factory: {error}") from error
        if not math.isfinite(value := float(loss.item())):
            raise NonFiniteError(f"the loss is {value}")
        return loss


class Trainer:
    """Trains a job step by step.

    Attributes:
        step: Optimizer steps done.
    """

    def __init__(self, job: Job) -> None:
        self.step = 0
        self._job = job
        self._training = job.plan.configuration.training
        self._loss = _CheckedLoss(job.loss)
        self._clamp = getattr(job.loss, "clamp_", None)
        self._parameters = [p for group in job.optimizer.param_groups for p in group["params"]]
        job.pipe.train()
        if isinstance(job.loss, nn.Module):
            job.loss.train()

    def train_step(self) -> StepResult:
        """One mini-batch forward and backward, and one step of the optimizer.

        Raises:
            NonFiniteError: If the loss is no number; the weights are then as before.
            RunError: If the loss is no scalar.
        """
        optimizer = self._job.optimizer
        factor = learning_rate_factor(self._training.schedule, self.step, self._training.steps)
        rate = set_learning_rate(optimizer, factor)
        optimizer.zero_grad(set_to_none=True)
        try:
            value = self._forward_and_backward()
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step + 1}: {error}") from None
        if self._training.clip_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._training.clip_gradient_norm)
        optimizer.step()
        if callable(self._clamp):
            self._clamp()
        self.step += 1
        return StepResult(value, rate)

    def _forward_and_backward(self) -> float:
        """The gradients of a mini-batch; its loss."""
        pipe, config = self._job.pipe, self._job.plan.configuration.pipeline
        inputs, targets = self._job.data.batch(self.step, self._training.batch_size)
        # Cells draw by (seed, step, micro-batch, cell); the loss draws as if it were one cell more.
        torch.manual_seed(cell_seed(self._training.seed, self.step, 0, len(pipe)))
        low = self._training.precision == "bfloat16"
        with torch.autocast(pipe.devices[-1].type, dtype=torch.bfloat16, enabled=low):
            loss = pipe.train_step(inputs, targets, self._loss, config.loss_over, schedule=config.schedule)
        return float(loss.item())

    def save(self) -> Save:
        """All that `load` needs.

        Raises:
            NonFiniteError: If a weight is no number: such a save must not take a good one's place.
        """
        job = self._job
        save = Save(
            format=FORMAT,
            step=self.step,
            pipe_step=job.pipe.step,
            model=dict(job.pipe.state_dict()),
            loss=loss_state(job.loss),
            optimizer=job.optimizer.state_dict(),
            written_with=written_with(job),
        )
        for name, weight in (save["model"] | save["loss"]).items():
            if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.isfinite().all():
                raise NonFiniteError(f"step {self.step}: the weights {name} are no longer all finite")
        return save

    def load(self, save: Save) -> None:
        """Go on from a save.

        Raises:
            RunError: If it does not fit the model, the loss or the optimizer.
        """
        job = self._job
        try:
            job.pipe.load_state_dict(save["model"])
            if isinstance(job.loss, nn.Module):
                job.loss.load_state_dict(save["loss"])
            job.optimizer.load_state_dict(save["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"the save of step {save['step']} does not fit what the factories build now: {error}"
            ) from error
        job.pipe.step = save["pipe_step"]
        self.step = save["step"]


def written_with(job: Job) -> dict[str, str]:
    """What may change the bits though the configuration does not."""
    return {"torch": str(torch.__version__), "device": job.pipe.devices[-1].type}
