"""What trains in this process: the pipe, the loss and the optimizer; here for one process with a thread a stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

import gpipe
from gpipe.rng import cell_seed
from gpipe.timeline import Timeline
from gpipe.training.checking import CheckedLoss, Loss, NonFiniteError, loss_parameters, loss_state, number
from gpipe.training.config import Configuration
from gpipe.training.errors import Silent
from gpipe.training.optimizer import build_optimizer, full_rate, set_learning_rate
from gpipe.training.vitals import peak_memory


class Engine(ABC):
    """Performs the parts of a training step; the same calls for one process and, on every rank, for ranks.

    Args:
        configuration: The run's.
        pipe: The model, or this rank's slice of it.
        loss: The user's.
        has_first: Whether the first stage is in this process.
        has_last: Whether the last stage is, and so the loss.

    Raises:
        FactoryError: The optimizer refuses the parameters.

    Attributes:
        pipe: As given.
        loss: As given; None where the last stage is not.
        saved_loss: The loss to save beside the pipe, if the pipe does not know it.
        optimizer: Over what is trained in this process; None if that is nothing.
        uses_batch: Whether inputs or targets are used in this process.
    """

    def __init__(
        self,
        configuration: Configuration,
        pipe: gpipe.GPipe | gpipe.DistributedGPipe,
        loss: Loss,
        *,
        has_first: bool,
        has_last: bool,
    ) -> None:
        self._configuration = configuration
        self.pipe, self.loss = pipe, loss if has_last else None
        self.saved_loss: nn.Module | None = None
        self.uses_batch = has_first or has_last
        named = [*self._named(), *(loss_parameters(loss) if has_last else ())]
        self._parameters = [parameter for _, parameter in named]
        trained = any(parameter.requires_grad for parameter in self._parameters)
        self.optimizer = build_optimizer(configuration.optimizer, named) if trained else None
        self._rate = full_rate(configuration.optimizer)
        pipe.train()
        if isinstance(loss, nn.Module):
            loss.train()

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the loss is, or the last stage of this process."""

    @abstractmethod
    def described(self) -> str:
        """Cells and device of every stage; called in all processes."""

    @abstractmethod
    def timeline(self) -> Timeline:
        """When every stage did what in the latest step; called in all processes."""

    @abstractmethod
    def peak_bytes(self) -> dict[str, int]:
        """The most bytes held so far, by process and accelerator; called in all processes."""

    @abstractmethod
    def clip_gradients(self, max_norm: float) -> None:
        """Scale the gradients of model and loss down where their norm together is larger."""

    @abstractmethod
    def _named(self) -> list[tuple[str, Parameter]]:
        """The model's parameters that are in this process."""

    @abstractmethod
    def _step(self, inputs: Any, targets: Any) -> Tensor:
        """Forward, loss and backward."""

    def set_learning_rate(self, factor: float) -> float:
        """Train on at this share of the configured learning rate, which is returned."""
        return self._rate * factor if self.optimizer is None else set_learning_rate(self.optimizer, factor)

    def forward_and_backward(self, step: int, inputs: Any, targets: Any) -> float:
        """The gradients of a mini-batch; its loss.

        Raises:
            NonFiniteError: The loss is no number. Silent: It is not, and is in another process, which tells.
            RunError: It is no scalar. OtherRankFailed: Another rank failed.
        """
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        training = self._configuration.training
        # Cells draw by (seed, step, micro-batch, cell); the loss draws as if it were one cell more.
        torch.manual_seed(cell_seed(training.seed, step, 0, sum(self.pipe.balance)))
        low = training.precision == "bfloat16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=low):
            loss = self._step(*(_pinned(tree, self.device) for tree in (inputs, targets)))
        try:
            return number(loss)
        except NonFiniteError as error:
            if self.loss is None:
                raise Silent(error.exit_code) from error
            raise

    def update(self) -> None:
        """A step of the optimizer; the loss is clamped if it wants to be."""
        if self.optimizer is not None:
            self.optimizer.step()
        if callable(clamp := getattr(self.loss, "clamp_", None)):
            clamp()

    def weights(self) -> dict[str, Tensor]:
        """The weights in this process: of the model, and of the loss where it is."""
        own: dict[str, Tensor] = dict(self.pipe.state_dict())
        return own if self.loss is None else {**own, **loss_state(self.loss)}


def _pinned(tree: Any, device: torch.device) -> Any:
    """A batch in memory that an accelerator reads by itself, so that the host need not wait for the copy."""
    if device.type == "cpu":
        return tree
    return tree_map_only(Tensor, lambda x: x.pin_memory() if x.device.type == "cpu" else x, tree)


class ThreadEngine(Engine):
    """All stages in this process, a thread each.

    Args:
        configuration: The run's.
        model: Becomes the pipe.
        loss: The user's; it goes to the device of the last stage.
        devices: Of the stages.

    Raises:
        TypeError, ValueError, IndexError: As `gpipe.GPipe`. FactoryError: As `Engine`.
    """

    def __init__(
        self, configuration: Configuration, model: nn.Module, loss: Loss, devices: Sequence[torch.device]
    ) -> None:
        config = configuration.pipeline
        torch.set_num_threads(config.threads * config.stages)  # GPipe divides what it finds among its workers
        try:
            self._pipe = gpipe.GPipe(
                model,
                config.balance,
                devices=devices,
                chunks=config.chunks,
                checkpoint=config.checkpoint,
                deferred_batch_norm=config.deferred_batch_norm,
                seed=configuration.training.seed,
            )
        finally:
            torch.set_num_threads(config.threads)
        if isinstance(loss, nn.Module):
            loss.to(self._pipe.devices[-1])
        self._loss = CheckedLoss(loss)
        super().__init__(configuration, self._pipe, loss, has_first=True, has_last=True)
        self.saved_loss = loss if isinstance(loss, nn.Module) else None

    @property
    def device(self) -> torch.device:
        """The last stage's."""
        return self._pipe.devices[-1]

    def described(self) -> str:
        """As described in `Engine`."""
        pipe = self._pipe
        return ", ".join(f"{cells} on {device}" for cells, device in zip(pipe.balance, pipe.devices, strict=True))

    def timeline(self) -> Timeline:
        """As described in `Engine`."""
        return self._pipe.timeline

    def peak_bytes(self) -> dict[str, int]:
        """As described in `Engine`."""
        return peak_memory(self._pipe.devices)

    def clip_gradients(self, max_norm: float) -> None:
        """As described in `Engine`."""
        nn.utils.clip_grad_norm_(self._parameters, max_norm)

    def _named(self) -> list[tuple[str, Parameter]]:
        return list(self._pipe.named_parameters())

    def _step(self, inputs: Any, targets: Any) -> Tensor:
        config = self._configuration.pipeline
        return self._pipe.train_step(inputs, targets, self._loss, config.loss_over, schedule=config.schedule)
