"""One optimizer step, and the state that has to be kept between two of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpipe.saving.saves import Saves
from gpipe.training.build import Job
from gpipe.training.checking import NonFiniteError
from gpipe.training.errors import RunError
from gpipe.training.optimizer import learning_rate_factor


class StepResult(NamedTuple):
    """What a step has to tell: its loss, and the learning rate it used."""

    loss: float
    learning_rate: float


class Trainer:
    """Trains a job step by step; called alike in all processes.

    Args:
        job: What to train.
        saves: Folder of the saves.

    Attributes:
        step: Optimizer steps done.
    """

    def __init__(self, job: Job, saves: Path) -> None:
        self.step = 0
        self._job = job
        self._saves = Saves(saves)
        self._training = job.plan.configuration.training
        self._infinite = {name for name, weight in job.engine.weights().items() if not _finite(weight)}

    def train_step(self) -> StepResult:
        """One mini-batch forward and backward, and one step of the optimizer.

        Raises:
            NonFiniteError: If the loss is no number; the weights are then as before.
            RunError: If the loss is no scalar, or a row of the data cannot be read.
            Silent, OtherRankFailed: If another rank failed.
        """
        engine, training = self._job.engine, self._training
        rate = engine.set_learning_rate(learning_rate_factor(training.schedule, self.step, training.steps))
        batch = self._batch() if engine.uses_batch else (None, None)
        try:
            value = engine.forward_and_backward(self.step, *batch)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.step + 1}: {error}") from None
        if training.clip_gradient_norm is not None:
            engine.clip_gradients(training.clip_gradient_norm)
        engine.update()
        self.step += 1
        return StepResult(value, rate)

    def _batch(self) -> tuple[Any, Any]:
        try:
            return self._job.data.batch(self.step, self._training.batch_size)
        except ValueError as error:
            raise RunError(f"step {self.step + 1}: {error}") from error

    def save(self) -> None:
        """Keep all that `load` needs.

        Raises:
            NonFiniteError: If a weight is no number: such a save must not take a good one's place.
            RunError: If writing fails; the saves before are then as they were.
        """
        engine, world = self._job.engine, self._job.world
        world.agreed(self._check_finite)
        extra: dict[str, Any] = {"pipe_step": engine.pipe.step, "written_with": written_with(self._job)}
        try:
            self._saves.write(self.step, engine.pipe, engine.optimizer, loss_fn=engine.saved_loss, extra=extra)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(str(error)) from error

    def _check_finite(self) -> None:
        for name, weight in self._job.engine.weights().items():
            if name not in self._infinite and not _finite(weight):
                raise NonFiniteError(f"step {self.step}: the weights {name} are no longer all finite")

    def load(self, warn: Callable[[str], None]) -> dict[str, str] | None:
        """Go on from the newest save that is whole; gives what it was written with, None where there is none.

        Args:
            warn: Told about each damaged save that is passed over.

        Raises:
            RunError: If none can be read, or it does not fit model, loss or optimizer.
        """
        engine = self._job.engine
        try:
            restored = self._saves.read(engine.pipe, engine.optimizer, loss_fn=engine.saved_loss, warn=warn)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(str(error)) from error
        if restored is None:
            return None
        engine.pipe.step = restored.extra["pipe_step"]
        self.step = restored.step
        then: dict[str, str] = restored.extra["written_with"]
        return then


def _finite(weight: Any) -> bool:
    return not (isinstance(weight, Tensor) and weight.is_floating_point()) or bool(weight.isfinite().all())


def written_with(job: Job) -> dict[str, str]:
    """What may change the bits though the configuration does not."""
    return {"torch": str(torch.__version__), "device": job.engine.device.type}
