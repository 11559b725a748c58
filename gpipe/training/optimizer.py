"""The optimizer and the learning rate, from the configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer, SparseAdam

from gpipe.training.config import ConstantSchedule, OptimizerConfig, Schedule
from gpipe.training.factory import FactoryError, checked_arguments
from gpipe.training.problems import close_match


def optimizer_class(config: OptimizerConfig) -> tuple[type[Optimizer], dict[str, Any]]:
    """The optimizer's class and its arguments, checked without a model.

    Raises:
        FactoryError: If there is no such optimizer, or it refuses the arguments.
    """
    names = _usable_optimizers()
    if config.name not in names:
        hint = close_match(config.name, names)
        raise FactoryError(f"optimizer.name: should be one of {', '.join(names)}, given {config.name!r}{hint}")
    found: type[Optimizer] = getattr(torch.optim, config.name)
    arguments = checked_arguments(found, config.arguments, "optimizer", skip=1)
    if arguments.get("differentiable"):
        raise FactoryError("optimizer.differentiable: steps are taken outside autograd's graph: leave it out")
    try:
        found([Parameter(torch.zeros(2, 2))], **arguments)
    except Exception as error:
        raise FactoryError(f"optimizer: {config.name} refuses its arguments: {error}") from error
    return found, arguments


def _usable_optimizers() -> list[str]:
    """All of ``torch.optim`` but those whose step wants a closure, or sparse gradients, which nothing here gives."""
    found = []
    for name, value in vars(torch.optim).items():
        if not inspect.isclass(value) or not issubclass(value, Optimizer) or value in (Optimizer, SparseAdam):
            continue
        closure = inspect.signature(value.step).parameters.get("closure")
        if closure is None or closure.default is not closure.empty:
            found.append(name)
    return sorted(found)


def build_optimizer(config: OptimizerConfig, parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
    """An optimizer over named parameters; frozen ones are left out.

    With ``config.decay_matrices_only``, parameters with fewer than two dimensions have no weight decay: gains, biases
    and scalars are not what it is to keep small.

    Raises:
        FactoryError: If there is nothing to train, or the optimizer refuses arguments or parameters.
    """
    kind, arguments = optimizer_class(config)
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    if not trained:
        raise FactoryError("optimizer: neither the model nor the loss has a parameter to train")
    groups: list[dict[str, Any]] = [{"params": trained}]
    if config.decay_matrices_only and "weight_decay" in inspect.signature(kind).parameters:
        matrices = [(name, parameter) for name, parameter in trained if parameter.ndim >= 2]
        others = [(name, parameter) for name, parameter in trained if parameter.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    try:
        return kind([group for group in groups if group["params"]], **arguments)
    except Exception as error:
        raise FactoryError(f"optimizer: {config.name} refuses the parameters: {error}") from error


def learning_rate_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The share of the full learning rate in step number ``step``: a function of its arguments and nothing else.

    Args:
        schedule: From the configuration.
        step: From 0.
        steps: All steps of the run; the end of the way down where the schedule names none.

    Returns:
        (step + 1) / warmup_steps while warming up; then 1, or from 1 down to ``final_share``.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    way = max(1, (schedule.decay_steps or steps) - schedule.warmup_steps)
    done = min(1.0, (step - schedule.warmup_steps) / way)
    height = 1 - done if schedule.name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.final_share + (1 - schedule.final_share) * height


def full_rate(config: OptimizerConfig) -> float:
    """The learning rate at factor 1: as configured, or the optimizer's own default."""
    kind, arguments = optimizer_class(config)
    rate: float = kind([Parameter(torch.zeros(2, 2))], **arguments).defaults["lr"]
    return rate


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Give every group ``factor`` times the rate the optimizer was built with; returns it."""
    rate: float = optimizer.defaults["lr"] * factor
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
