"""Models as slices of flat cells: a rank's part under torch.distributed.pipelining, the ceiling, a model recomputed.

Told no shapes, torch runs the model on integers it has not set (CLIP's tokens), and on gradients in a layout that it
then refuses to receive (U-Net's skips): it is told them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Contender, Running, counted
from benchmarks.flat import FlatCell, flat_cells, packed, unpacked
from benchmarks.models import Net, moved, parts
from gpipe.partitioning.skips import Key, Skip

CPU = torch.device("cpu")


def flat_net(net: Net, chunks: int, device: torch.device = CPU) -> tuple[list[FlatCell], list[Skip], nn.Module]:
    """The cells of a model, flat, its skip connections, and its loss."""
    module, loss = (m.to(device) for m in net.made())
    x, _ = net.batch()
    return *flat_cells(module, moved(parts(x, chunks)[0], device)), loss


class Slice(nn.Module):
    """Consecutive cells as a stage for torch: what skips past a boundary travels over it.

    Args:
        cells: All of the model.
        skips: Its skip connections.
        own: Which of the cells are this stage's.
        recompute: What torch.utils.checkpoint is put around: ``"never"``, ``"cells"`` or ``"stage"``.
    """

    def __init__(self, cells: Sequence[FlatCell], skips: Sequence[Skip], own: slice, recompute: str) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells[own])  # for their parameters
        self._flat = list(cells[own])
        self.entering = _crossing(skips, own.start)
        self.leaving = _crossing(skips, own.stop)
        self.recompute = recompute

    def forward(self, *tensors: Tensor) -> Any:
        """What crosses the next boundary, from what crosses the one before."""
        return packed(_run(self.recompute == "stage", self._body, *tensors))

    def _body(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(_Contiguous.apply(t) if t.requires_grad else t for t in tensors)
        count = len(tensors) - len(self.entering)
        held = dict(zip(self.entering, tensors[count:], strict=True))
        tensors = tensors[:count]
        for cell in self._flat:
            popped = [held.pop(key) for key in cell.popped]
            tensors, stashed = _run(self.recompute == "cells", cell, tensors, popped)
            held |= zip(cell.stashed, stashed, strict=True)
        given = *tensors, *(held[key] for key in self.leaving)
        return tuple(t.contiguous() for t in given)  # torch sends no other


class _Contiguous(torch.autograd.Function):
    """A gradient as torch can send it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _run(again: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    if not again:
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _crossing(skips: Sequence[Skip], cell: int) -> list[Key]:
    """What is stashed before ``cell`` and popped there or later."""
    return [skip.key for skip in skips if skip.source < cell <= skip.target]


def _own(contender: Contender, rank: int) -> slice:
    start = sum(contender.balance[:rank])
    return slice(start, start + contender.balance[rank])


def _arriving(cells: Sequence[FlatCell], skips: Sequence[Skip], contender: Contender, rank: int) -> tuple[Tensor, ...]:
    """What a micro-batch brings to the stage of ``rank``."""
    x, _ = contender.trains().batch()
    tensors = unpacked(parts(x, contender.chunks)[0])
    with torch.no_grad():
        for k in range(rank):
            tensors = unpacked(Slice(cells, skips, _own(contender, k), "never")(*tensors))
    return tuple(t.requires_grad_() if rank and t.is_floating_point() else t for t in tensors)


def torch_pipelining(rank: int, contender: Contender) -> Running:
    """A stage a rank, ``contender.schedule`` the name of a schedule class."""
    from torch.distributed import pipelining

    net = contender.trains()
    cells, skips, loss = flat_net(net, contender.chunks)
    module = Slice(cells, skips, _own(contender, rank), str(contender.recompute))
    arriving = _arriving(cells, skips, contender, rank)
    stage = pipelining.PipelineStage(module, rank, contender.stages, CPU, arriving, module(*arriving))
    runs = getattr(pipelining, contender.schedule)(stage, n_microbatches=contender.chunks, loss_fn=loss)
    x, y = net.batch()
    inputs = unpacked(x) if rank == 0 else ()
    options = {"target": y, "losses": []} if rank + 1 == contender.stages else {}
    modules = [module, loss] if options else [module]

    def step() -> None:
        for m in modules:
            m.zero_grad()
        runs.step(*inputs, return_outputs=False, **options)
        for p in loss.parameters():  # torch divides by M what belongs to its stages, and forgets the loss
            if p.grad is not None:
                p.grad /= contender.chunks

    return Running(step, [p for m in modules for p in m.parameters()], counted(step, rank, modules, inputs))


def ceiling(rank: int, contender: Contender) -> Running:
    """Every rank busy with its own stage, as the balance has it: no bubble, no messages."""
    net = contender.trains()
    cells, skips, loss = flat_net(net, contender.chunks)
    module = Slice(cells, skips, _own(contender, rank), "never")
    inputs = _arriving(cells, skips, contender, rank)
    last = rank + 1 == contender.stages
    modules = [module, loss] if last else [module]
    aims = parts(net.batch()[1], contender.chunks)

    def step() -> None:
        for m in modules:
            m.zero_grad()
        for target in aims:
            for t in inputs:
                t.grad = None
            outputs = module(*inputs)
            if last:
                (loss(outputs, target) / contender.chunks).backward()
            else:
                given = [t for t in unpacked(outputs) if t.requires_grad]
                torch.autograd.backward(given, given)

    return Running(step, [p for m in modules for p in m.parameters()], counted(step, rank, modules))


class Checkpointed(nn.Module):
    """A whole model, each cell in torch.utils.checkpoint."""

    def __init__(self, cells: Sequence[FlatCell], skips: Sequence[Skip]) -> None:
        super().__init__()
        self.body = Slice(cells, skips, slice(0, len(cells)), "cells")

    def forward(self, inputs: Any) -> Any:
        """As the model."""
        return self.body(*unpacked(inputs))


def checkpointed(net: Net, chunks: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The model, each cell in torch.utils.checkpoint, and its loss."""
    cells, skips, loss = flat_net(net, chunks, device)
    return Checkpointed(cells, skips), loss
