"""The door between the caller's autograd graph and the pipeline.

Autograd runs a Function's backward in the engine thread of the device its outputs live on. If the pipeline's backward
started there, the stage on that device would wait for the very thread that waits for it. So the output is made by two
Functions: ``_Enter`` takes the inputs and parameters and gives a CPU scalar, ``_Leave`` turns that token into the
outputs.
Backward of the second stores the output gradients; backward of the first runs in the thread that called ``backward()``,
and starts the workers from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gpipe.boundary import Boundary, Gradients, leaves_once


class Backward(Protocol):
    """A mini-batch that has gone forward."""

    output_gradients: list[Gradients]

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The trainable parameters."""

    def backward(self, keep_graph: bool) -> tuple[list[Gradients], list[Tensor | None]]:
        """Gradients of inputs, by micro-batch and leaf, and of parameters, from ``output_gradients``."""


def attach(mini_batch: Backward, inputs: Sequence[Any], outputs: Sequence[Boundary]) -> list[Any]:
    """Make ``outputs`` the result of ``inputs`` and the parameters in the caller's autograd graph.

    Args:
        mini_batch: What runs backward.
        inputs: Every micro-batch's input, with its graph.
        outputs: Every micro-batch's output, without.

    Returns:
        Every micro-batch's output, with its graph.
    """
    entering = [
        [leaf if isinstance(leaf, Tensor) and leaf.requires_grad else None for leaf in leaves_once(tree)[0]]
        for tree in inputs
    ]
    tensors = [leaf for leaves in entering for leaf in leaves if leaf is not None]
    places = [[leaf is not None for leaf in leaves] for leaves in entering]
    token = _Enter.apply(mini_batch, places, *tensors, *mini_batch.parameters)
    needed = [output.needs_grad for output in outputs]
    leaving = [x for o in outputs for x, need in zip(o.leaves, o.needs_grad, strict=True) if need]
    if not leaving:
        return [output.tree() for output in outputs]
    left = iter(_Leave.apply(mini_batch, needed, token, _Results(leaving)))
    return [
        o.tree([next(left) if need else x for x, need in zip(o.leaves, o.needs_grad, strict=True)]) for o in outputs
    ]


class _Results:
    """Hands tensors to a Function's forward as its own results, not as inputs."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mini_batch: Backward, places: list[list[bool]], *tensors: Tensor) -> Tensor:
        ctx.mini_batch, ctx.places = mini_batch, places
        return torch.zeros((), device="cpu")

    @staticmethod
    def backward(ctx: Any, token_gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True asks for a gradient of the gradient, which a pipeline cannot give: "
                "call backward without it, or differentiate the unwrapped module"
            )
        keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        arrived, totals = ctx.mini_batch.backward(keep_graph)
        inputs = [
            g
            for row, wanted in zip(arrived, ctx.places, strict=True)
            for g, want in zip(row, wanted, strict=True)
            if want
        ]
        return (None, None, *inputs, *totals)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mini_batch: Backward, needed: list[tuple[bool, ...]], token: Tensor, outputs: _Results
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.mini_batch, ctx.needed = mini_batch, needed
        return tuple(outputs.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None, Tensor, None]:
        left = iter(gradients)
        ctx.mini_batch.output_gradients = [[next(left) if need else None for need in row] for row in ctx.needed]
        return None, None, torch.zeros((), device="cpu"), None
