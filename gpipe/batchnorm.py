"""Running statistics of batch normalisation once per mini-batch instead of once per micro-batch.

Every micro-batch is still normalised by its own statistics; only the running mean and variance, used in eval mode, are
those of the whole mini-batch, as one batch-norm pass over it would leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gpipe.phase import current_phase

_MARK = "_gpipe_deferred"


class Moments(NamedTuple):
    """Of one micro-batch, per channel: rows seen, mean, and what is the mean squared deviation once scaled."""

    samples: int
    mean: Tensor  # (C,)
    variance: Tensor  # (C,)
    scale: float = 1.0


@dataclass
class Seen:
    """What one layer has seen of a mini-batch.

    Attributes:
        moments: By micro-batch; one for each time forward runs the layer.
    """

    moments: dict[int, list[Moments]] = field(default_factory=dict)
    _rows: list[Tensor] = field(default_factory=list)
    _scratch: Tensor | None = None

    def row(self, x: Tensor) -> Tensor:
        """Room for mean and variance of a micro-batch ``x``: (2, C), zero."""
        if not self._rows:
            dtype = torch.promote_types(x.dtype, torch.float32)
            self._rows += torch.zeros(_ROWS, 2, x.shape[1], dtype=dtype, device=x.device).unbind()
        return self._rows.pop()

    def scratch(self, x: Tensor) -> Tensor:
        """The same, for what nobody will read: a recompute takes the path of its forward."""
        if self._scratch is None:
            self._scratch = self.row(x)
        return self._scratch


Statistics = dict[_BatchNorm, Seen]
Group = dict[_BatchNorm, list[Moments]]


def defer(module: nn.Module) -> None:
    """Let every batch-norm layer in ``module`` collect its statistics while a pipeline runs it.

    Outside a pipeline the layers behave as before.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and not hasattr(layer, _MARK):
            setattr(layer, _MARK, None)
            layer.register_forward_pre_hook(_collect, with_kwargs=True)
            layer.register_forward_hook(_restore, always_call=True)


def deferred(module: nn.Module) -> bool:
    """Whether a forward in a pipeline that defers leaves the buffers of ``module`` to ``commit``."""
    return module.training and hasattr(module, _MARK)


@torch.no_grad()
def commit(statistics: Statistics) -> None:
    """Update running mean, variance and ``num_batches_tracked`` as one pass over the mini-batch would."""
    uses: dict[_BatchNorm, list[list[Moments]]] = {}
    for layer, seen in statistics.items():
        together = zip_longest(*(seen.moments[m] for m in sorted(seen.moments)))
        uses[layer] = [[m for m in moments if m is not None] for moments in together]
    for n in range(max(map(len, uses.values()), default=0)):
        alike: dict[tuple[torch.device, torch.dtype], Group] = {}
        for layer, moments in uses.items():
            if n < len(moments):
                mean = moments[n][0].mean
                alike.setdefault((mean.device, mean.dtype), {})[layer] = moments[n]
        for group in alike.values():
            _merge(group)


def _merge(group: Group) -> None:
    """Update layers of one device and type, each kernel for all of them where that can be."""
    each = [m for moments in group.values() for m in moments]
    counts = [sum(m.samples for m in moments) for moments in group.values()]
    shares = [m.samples / count for moments, count in zip(group.values(), counts, strict=True) for m in moments]
    means = _sums(torch._foreach_mul([m.mean for m in each], shares), group)
    centres = [mean for mean, moments in zip(means, group.values(), strict=True) for _ in moments]
    squares = torch._foreach_pow(torch._foreach_sub([m.mean for m in each], centres), 2)
    variances = [m.variance for m in each]
    if any(m.scale != 1 for m in each):
        variances = list(torch._foreach_mul(variances, [m.scale for m in each]))
    torch._foreach_add_(squares, variances)
    torch._foreach_mul_(squares, [float(m.samples) for m in each])
    summed = _sums(squares, group)
    torch._foreach_div_(summed, [float(max(count - 1, 1)) for count in counts])
    _update(list(group), means, summed)


def _sums(of_each: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sum over the micro-batches of every layer."""
    rest = iter(of_each)
    return [torch.stack(list(islice(rest, len(moments)))).sum(0) for moments in group.values()]


def _update(layers: Sequence[_BatchNorm], means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    counters = [layer.num_batches_tracked for layer in layers if layer.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    by_factor: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for layer, mean, variance in zip(layers, means, variances, strict=True):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        pairs = [(layer.running_mean, mean), (layer.running_var, variance)]
        by_factor.setdefault(_factor(layer), []).extend(pairs)
    for factor, pairs in by_factor.items():
        running = [old for old, _ in pairs]
        torch._foreach_mul_(running, 1 - factor)
        torch._foreach_add_(running, [new.to(old.dtype) for old, new in pairs], alpha=factor)


def _factor(layer: _BatchNorm) -> float:
    """How much of the running statistics is new."""
    if layer.momentum is not None:
        return layer.momentum
    return 1.0 / float(layer.num_batches_tracked) if layer.num_batches_tracked is not None else 0.0


class _Aside(NamedTuple):
    """What a layer does without while its forward runs."""

    buffers: dict[str, Tensor | None]
    momentum: float | None


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_ROWS = 16  # made at once


def _collect(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    phase = current_phase()
    if phase is None or phase.statistics is None or not layer.training:
        return
    x: Tensor = (args[0] if args else kwargs["input"]).detach()
    seen = phase.statistics.setdefault(layer, Seen())
    setattr(layer, _MARK, _Aside({name: layer._buffers[name] for name in _BUFFERS}, layer.momentum))
    layer._buffers.update(dict.fromkeys(_BUFFERS))
    samples = x.numel() // x.shape[1]
    if _forward_tells(layer, x):
        # What is to be "running" are the statistics of this micro-batch alone; the kernel has them at hand.
        mean, variance = seen.scratch(x) if phase.recomputing else seen.row(x)
        layer._buffers.update(running_mean=mean, running_var=variance)
        layer.momentum = 1.0
        moments = Moments(samples, mean, variance, (samples - 1) / samples)
    elif not phase.recomputing:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1], correction=0)
        moments = Moments(samples, mean, variance)
    if not phase.recomputing:
        seen.moments.setdefault(phase.micro_batch, []).append(moments)


def _forward_tells(layer: _BatchNorm, x: Tensor) -> bool:
    """Whether forward itself can give the statistics: no further pass over the activations, where kernels cost most."""
    if x.device.type == "cpu" or type(layer).forward is not _BatchNorm.forward:
        return False
    running = getattr(layer, _MARK).buffers["running_mean"]
    return running is not None and running.dtype == torch.promote_types(x.dtype, torch.float32)


def _restore(layer: _BatchNorm, args: Any, output: Any) -> None:
    aside: _Aside | None = getattr(layer, _MARK)
    if aside is not None:
        layer._buffers.update(aside.buffers)
        layer.momentum = aside.momentum
        setattr(layer, _MARK, None)
