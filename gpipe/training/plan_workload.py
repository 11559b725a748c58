"""What is to be planned: the model of a configuration, one mini-batch, and what the optimizer holds besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from gpipe.partitioning.cells import Cell, cells_of
from gpipe.training.build import Plan, build_model, build_run_data
from gpipe.training.config import OptimizerConfig
from gpipe.training.errors import ConfigurationError
from gpipe.training.optimizer import optimizer_class

_ASSUMED_STATIC = 4.0


@dataclass(frozen=True)
class Workload:
    """A model and one mini-batch of it.

    Attributes:
        module: The model; on the meta device if nothing is to be measured.
        cells: Its cells.
        sample: Inputs of one mini-batch.
        rows: Rows of the mini-batch.
        bfloat16: Whether forward runs under autocast.
    """

    module: nn.Module
    cells: list[Cell]
    sample: Any
    rows: int
    bfloat16: bool

    def input_bytes(self, chunks: int) -> int:
        """One micro-batch of the inputs, the largest."""
        size = sum(t.nbytes for t in tree_leaves(self.sample) if isinstance(t, Tensor))
        return -(-size * -(-self.rows // chunks) // self.rows)


def make_workload(plan: Plan, *, allocate: bool) -> Workload:
    """Build the model and take the first mini-batch of the data.

    Args:
        plan: The checked configuration.
        allocate: Whether the model is to have weights, or only their shapes.

    Raises:
        ConfigurationError: A factory fails, the data cannot be read, or the model is no sequence of cells.
    """
    model = build_model(plan) if allocate else _shapes_of_model(plan)
    try:
        cells = cells_of(model)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(plan.source, [f"model.factory: {error}"]) from error
    if not cells:
        raise ConfigurationError(plan.source, ["model.factory: gave a model without cells; there is nothing to divide"])
    training = plan.configuration.training
    try:
        sample, _ = build_run_data(plan).batch(0, training.batch_size)
    except ValueError as error:
        raise ConfigurationError(plan.source, [f"training.batch_size: {error}"]) from error
    model.train()
    return Workload(model, cells, sample, training.batch_size, training.precision == "bfloat16")


def _shapes_of_model(plan: Plan) -> nn.Module:
    """The model on the meta device, or with weights if its factory computes with values."""
    try:
        with torch.device("meta"):
            return build_model(plan)
    except ConfigurationError:
        return build_model(plan)  # and if it fails again, with the message the user should see


def static_bytes(config: OptimizerConfig) -> tuple[float, bool]:
    """Bytes held all step long per byte of parameter: the parameter, its gradient and the optimizer's state.

    The state is counted after one step on a small matrix: 2 for plain SGD, 3 with momentum, 4 for Adam.

    Returns:
        the number, and whether it was counted: an optimizer that refuses the matrix is taken for Adam.
    """
    kind, arguments = optimizer_class(config)
    matrix = Parameter(torch.ones(64, 64))
    matrix.grad = torch.ones_like(matrix)
    try:
        optimizer = kind([matrix], **arguments)
        optimizer.step()
    except Exception:  # such as with capturable=True, which steps on accelerators alone
        return _ASSUMED_STATIC, False
    state = sum(t.nbytes for t in tree_leaves(optimizer.state[matrix]) if isinstance(t, Tensor))
    return 2 + round(state / matrix.nbytes, 1), True
