"""Peak bytes of every stage of a pipeline that runs all its CPU stages in one thread at a time.

Torchgpipe and fairscale's Pipe run the forward of all CPU stages in one worker thread and the backward in the caller's.
So the bytes are booked on the stage that runs, as ``gpipe.record(memory=True)`` books ours: what a stage gives is
copied onto the account of the next, as if that had a device of its own. What is stashed stays where it was made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.flat import packed, unpacked
from gpipe.partitioning.live import LiveBytes
from gpipe.partitioning.mode import ThreadMode


class StageMeters(ThreadMode):
    """Counts for the stage that runs; enter it around a step.

    Args:
        stages: The pipeline's own modules of its stages; their forwards are wrapped.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.meters = [LiveBytes() for _ in stages]
        self.current = 0
        self._inside = threading.local()
        for k, stage in enumerate(stages):
            stage.forward = partial(self._forward, k, stage.forward)  # type: ignore[method-assign]

    def __enter__(self) -> StageMeters:
        self._inside.yes = True
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._inside.yes = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator on the account of the stage that runs."""
        return self.meters[self.current].__torch_dispatch__(func, types, args, kwargs)

    def _forward(self, stage: int, forward: Any, inputs: Any) -> Any:
        if not getattr(self._inside, "yes", False):  # a worker's thread; in a recompute the caller is inside already
            with self:
                return self._forward(stage, forward, inputs)
        self.current = stage
        entered = _Turn.apply(self, max(0, stage - 1), *unpacked(inputs))
        outputs = unpacked(forward(packed(entered)))
        if stage + 1 < len(self.meters):
            self.current = stage + 1
            outputs = tuple(output.clone() for output in outputs)
            self.current = stage
        return packed(_Turn.apply(self, stage, *outputs))


class _Turn(torch.autograd.Function):
    """Does nothing forward; backward it is another stage's turn from here on."""

    @staticmethod
    def forward(ctx: Any, meters: StageMeters, stage: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.turn = meters, stage
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        meters, stage = ctx.turn
        meters.current = stage
        return None, None, *gradients
