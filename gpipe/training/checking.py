"""The user's loss, made sure of: it gives a scalar; and whether that is a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from gpipe.loss import checked_loss
from gpipe.training.errors import RunError

Loss = Callable[[Any, Any], Tensor]

_HELD = ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")


class NonFiniteError(RunError):
    """The loss or the weights are no longer numbers."""


def number(loss: Tensor) -> float:
    """The value of a loss: where it is on an accelerator, the host waits for the device once, here.

    A micro-batch's loss that is no number makes the mini-batch's none.

    Raises:
        NonFiniteError: It is no number.
    """
    if not math.isfinite(value := float(loss.item())):
        raise NonFiniteError(f"the loss is {value}")
    return value


class CheckedLoss(nn.Module):
    """The loss, if it gives a loss; parameters and state are the loss's, under its own names."""

    loss: Loss

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        vars(self)["loss"] = loss
        if isinstance(loss, nn.Module):
            vars(self).update({key: vars(loss)[key] for key in _HELD})  # no hooks: the loss itself runs them

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """As of the loss.

        Raises:
            RunError: It is no scalar.
        """
        try:
            return checked_loss(self.loss(outputs, targets))
        except (TypeError, ValueError) as error:
            raise RunError(f"loss.factory: {error}") from error

    def train(self, mode: bool = True) -> Self:
        """Set training mode on the loss too."""
        if isinstance(self.loss, nn.Module):
            self.loss.train(mode)
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.loss, nn.Module):
            self.loss._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.loss, nn.Module):
            self.loss._load_from_state_dict(*args, **kwargs)


def loss_state(loss: Loss) -> dict[str, Any]:
    """The weights of a loss under its own names; none for a plain function."""
    return dict(loss.state_dict()) if isinstance(loss, nn.Module) else {}


def loss_parameters(loss: Loss) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a loss by name, as the optimizer knows them; none for a plain function."""
    named = loss.named_parameters() if isinstance(loss, nn.Module) else ()
    return [(f"loss.{name}", parameter) for name, parameter in named]
