"""Running statistics of batch normalisation once per mini-batch instead of once per micro-batch.

Every micro-batch is still normalised by its own statistics; only the running mean and variance, used in eval mode, are
those of the whole mini-batch, as one batch-norm pass over it would leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gpipe.phase import current_phase

_MARK = "_gpipe_deferred"


class Moments(NamedTuple):
    """Of one micro-batch, per channel: rows seen, mean, and mean squared deviation."""

    samples: int
    mean: Tensor  # (C,)
    variance: Tensor  # (C,) biased


Statistics = dict[_BatchNorm, dict[int, list[Moments]]]  # by micro-batch; one for each time forward runs the layer


def defer(module: nn.Module) -> None:
    """Let every batch-norm layer in ``module`` collect its statistics while a pipeline runs it.

    Outside a pipeline the layers behave as before.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and not hasattr(layer, _MARK):
            setattr(layer, _MARK, {})
            layer.register_forward_pre_hook(_collect, with_kwargs=True)
            layer.register_forward_hook(_restore, always_call=True)


def deferred(module: nn.Module) -> bool:
    """Whether a forward in a pipeline that defers leaves the buffers of ``module`` to ``commit``."""
    return module.training and hasattr(module, _MARK)


def commit(statistics: Statistics) -> None:
    """Update running mean, variance and ``num_batches_tracked`` as one pass over the mini-batch would."""
    for layer, by_micro_batch in statistics.items():
        for moments in zip_longest(*(by_micro_batch[m] for m in sorted(by_micro_batch))):
            _merge(layer, [m for m in moments if m is not None])


@torch.no_grad()
def _merge(layer: _BatchNorm, moments: Sequence[Moments]) -> None:
    count = sum(m.samples for m in moments)
    mean = torch.stack([m.mean * (m.samples / count) for m in moments]).sum(0)
    squares = torch.stack([m.samples * (m.variance + (m.mean - mean) ** 2) for m in moments]).sum(0)
    _update(layer, mean, squares / max(count - 1, 1))


def _update(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    factor = layer.momentum
    if factor is None:
        factor = 1.0 / float(layer.num_batches_tracked) if layer.num_batches_tracked is not None else 0.0
    layer.running_mean.mul_(1 - factor).add_(mean.to(layer.running_mean.dtype), alpha=factor)
    layer.running_var.mul_(1 - factor).add_(variance.to(layer.running_var.dtype), alpha=factor)


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _collect(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    phase = current_phase()
    if phase is None or phase.statistics is None or not layer.training:
        return
    x: Tensor = (args[0] if args else kwargs["input"]).detach()
    if not phase.recomputing:
        dims = [d for d in range(x.dim()) if d != 1]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(x, dims, correction=0)
        moments = Moments(x.numel() // x.shape[1], mean, variance)
        phase.statistics.setdefault(layer, {}).setdefault(phase.micro_batch, []).append(moments)
    setattr(layer, _MARK, {name: layer._buffers[name] for name in _BUFFERS})
    layer._buffers.update(dict.fromkeys(_BUFFERS))


def _restore(layer: _BatchNorm, args: Any, output: Any) -> None:
    layer._buffers.update(getattr(layer, _MARK))
    setattr(layer, _MARK, {})
