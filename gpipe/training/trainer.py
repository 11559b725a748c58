"""One optimizer step, and the state that has to be kept between two of them."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gpipe.loss import checked_loss
from gpipe.rng import cell_seed
from gpipe.training.build import Job, loss_state
from gpipe.training.errors import RunError
from gpipe.training.optimizer import learning_rate_factor, set_learning_rate
from gpipe.training.saving import FORMAT, Save


class StepResult(NamedTuple):
    """What a step has to tell: its loss, and the learning rate it used."""

    loss: float
    learning_rate: float


class NonFiniteError(RunError):
    """The loss or the weights are no longer numbers."""


class Trainer:
    """Trains a job step by step.

    Attributes:
        step: Optimizer steps done.
    """

    def __init__(self, job: Job) -> None:
        self.step = 0
        self._job = job
        self._training = job.plan.configuration.training
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
        loss = self._forward()
        value = float(loss.item())
        if not math.isfinite(value):
            raise NonFiniteError(f"step {self.step + 1}: the loss is {value}")
        loss.backward()  # type: ignore[no-untyped-call]
        if self._training.clip_gradient_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._training.clip_gradient_norm)
        optimizer.step()
        if callable(self._clamp):
            self._clamp()
        self.step += 1
        return StepResult(value, rate)

    def _forward(self) -> Tensor:
        pipe = self._job.pipe
        inputs, targets = self._job.data.batch(self.step, self._training.batch_size)
        last = pipe.devices[-1]
        targets = tree_map_only(Tensor, partial(Tensor.to, device=last), targets)
        # Cells draw by (seed, step, micro-batch, cell); the loss draws as if it were one cell more.
        torch.manual_seed(cell_seed(self._training.seed, self.step, 0, len(pipe)))
        low = self._training.precision == "bfloat16"
        with torch.autocast(last.type, dtype=torch.bfloat16, enabled=low):
            loss = self._job.loss(pipe(inputs), targets)
        try:
            return checked_loss(loss)
        except (TypeError, ValueError) as error:
            raise RunError(f"loss.factory: {error}") from error

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
