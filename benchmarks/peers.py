"""The peers: torch.distributed.pipelining, torchgpipe and fairscale's Pipe, each with its best honest settings.

Torchgpipe and fairscale's Pipe run all CPU stages in one worker thread and backward in the caller's: on CPUs they do
not pipeline. They therefore get all intra-op threads, which is the fastest they can be. Their balance is that of their
own ``balance_by_time``; torch has none, so that its stages have as many cells each.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Contender, Running, idle, own_bytes, tensor_bytes, with_threads
from benchmarks.flat import FlatCell, packed, unpacked
from benchmarks.models import Net, moved, parts
from benchmarks.slices import CPU, flat_net
from benchmarks.stage_meters import StageMeters
from gpipe.partitioning.profile import profile
from gpipe.partitioning.skips import Key

PACKAGES = {"torch": "torch.distributed.pipelining", "torchgpipe": "torchgpipe", "fairscale": "fairscale.nn.pipe"}


def missing() -> dict[str, str]:
    """By name the peers that cannot be imported here, and why."""
    found = {}
    for name, package in PACKAGES.items():
        try:
            _imported(package)
        except Exception as error:  # whatever an old package does on a new torch
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _imported(package: str) -> Any:
    with _quiet():
        return importlib.import_module(package)


@contextmanager
def _quiet() -> Any:
    """Without the deprecation warnings of old packages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- torchgpipe and fairscale's Pipe ----------------------------------------------------------------------------------


class _Cell(nn.Module):
    """A flat cell without skips: a tensor or a tuple of tensors in and out."""

    def __init__(self, cell: FlatCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, inputs: Any) -> Any:
        outputs, _ = self.cell(unpacked(inputs))
        return packed(outputs)


def _skipping(package: Any, cell: FlatCell, names: dict[Key, str]) -> nn.Module:
    """The same as a module that is skippable in the way of ``package``."""

    class Skipping(_Cell):
        def __init__(self) -> None:
            super().__init__(cell)

        def forward(self, inputs: Any) -> Any:
            popped = []
            for key in self.cell.popped:
                popped.append((yield package.pop(names[key])))
            outputs, stashed = self.cell(unpacked(inputs), popped)
            for key, value in zip(self.cell.stashed, stashed, strict=True):
                yield package.stash(names[key], value)
            return packed(outputs)

    stash, pop = ([names[key] for key in keys] for keys in (cell.stashed, cell.popped))
    made: nn.Module = package.skippable(stash=stash, pop=pop)(Skipping)()
    return made


def _sequential(skip: Any, net: Net, chunks: int, device: torch.device = CPU) -> tuple[nn.Sequential, nn.Module]:
    cells, skips, loss = flat_net(net, chunks, device)
    names = {s.key: f"skip{i}" for i, s in enumerate(skips)}
    made = [_skipping(skip, cell, names) if cell.popped or cell.stashed else _Cell(cell) for cell in cells]
    return nn.Sequential(*made), loss


def _wrapped(
    package: str, door: str, net: Net, balance: Sequence[int], chunks: int, checkpoint: Any, devices: Sequence[Any]
) -> tuple[Any, nn.Module]:
    """The model in a pipe of theirs, and its loss."""
    module, loss = _sequential(_imported(f"{package}.skip"), net, chunks, devices[0])
    with _quiet():
        pipe = getattr(_imported(package), door)(
            module, list(balance), devices=devices, chunks=chunks, checkpoint=checkpoint
        )
    return pipe, loss


def _pipe(package: str, door: str, rank: int, contender: Contender) -> Running:
    """Both projects have one interface."""
    if rank:
        return idle()
    net = contender.trains()
    devices = [CPU] * contender.stages
    pipe, loss = _wrapped(package, door, net, contender.balance, contender.chunks, contender.recompute, devices)
    x, y = net.batch()
    inputs = packed(unpacked(x))
    run = _whole(pipe, inputs, y, contender.chunks, loss)

    def peaks() -> dict[int, int]:
        before = [own_bytes([stage]) for stage in pipe.partitions]
        with StageMeters(pipe.partitions) as meters:
            run()
            for meter in meters.meters:
                meter.restart()
            run()
        before[0] += tensor_bytes(inputs)
        return {k: meter.peak + size for k, (meter, size) in enumerate(zip(meters.meters, before, strict=True))}

    step = with_threads(contender.threads, run)
    return Running(step, [*pipe.parameters(), *loss.parameters()], peaks)


def _whole(pipe: nn.Module, x: Any, y: Tensor, chunks: int, loss: nn.Module) -> Callable[[], None]:
    """A step through a pipe whose output is that of the whole mini-batch."""

    def step() -> None:
        pipe.zero_grad()
        loss.zero_grad()
        outputs = parts(pipe(x), chunks)
        total = sum(loss(part, aim) for part, aim in zip(outputs, parts(y, chunks), strict=True))
        del outputs
        (total / chunks).backward()

    return step


def sharing_torchgpipe(
    net: Net, chunks: int, devices: Sequence[torch.device], checkpoint: str, batch: tuple[Any, Tensor]
) -> tuple[nn.Module, nn.Module, Callable[[], None]]:
    """Torchgpipe's GPipe on ``devices``, balanced by its own tool there; its loss, and a step."""
    balance, _ = balance_of("torchgpipe", net, chunks, len(devices), devices[0])
    pipe, loss = _wrapped("torchgpipe", "GPipe", net, balance, chunks, checkpoint, devices)
    x, y = batch
    return pipe, loss, _whole(pipe, packed(unpacked(x)), y, chunks, loss)


def torchgpipe(rank: int, contender: Contender) -> Running:
    """Torchgpipe's GPipe, all of it in rank 0."""
    return _pipe("torchgpipe", "GPipe", rank, contender)


def fairscale(rank: int, contender: Contender) -> Running:
    """Fairscale's Pipe, all of it in rank 0."""
    return _pipe("fairscale.nn.pipe", "Pipe", rank, contender)


# --- balance ----------------------------------------------------------------------------------------------------------


def uniform(cells: int, stages: int) -> tuple[int, ...]:
    """As many cells each."""
    return tuple(cells // stages + (k < cells % stages) for k in range(stages))


def balance_of(
    peer: str, net: Net, chunks: int, stages: int, device: torch.device = CPU
) -> tuple[tuple[int, ...], str]:
    """Cells per stage by the peer's own tool, and what that was.

    Its profiler fails where cells stash and pop, for it runs backward twice through what was stashed: there it is
    handed the seconds of ours, and divides by them.

    Args:
        peer: A key of ``PACKAGES``.
        net: The model.
        chunks: Number of micro-batches; it is profiled on one.
        stages: Number of stages.
        device: Where it is profiled.
    """
    if peer == "torch":
        return uniform(len(flat_net(net, chunks)[0]), stages), "as many cells each"
    package = PACKAGES[peer]
    module, _ = _sequential(_imported(f"{package}.skip"), net, chunks, device)
    sample = moved(parts(net.batch()[0], chunks)[0], device)
    tool = _imported(f"{package}.balance")
    try:
        with _quiet():
            found = tool.balance_by_time(stages, module, sample, device=device)
        return tuple(found), "its balance_by_time"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        costs = profile(net.made()[0], net.batch()[0], device=device, chunks=chunks)
        times = [int(1e6 * (c.forward_seconds + c.backward_seconds)) for c in costs]
        return tuple(
            map(len, tool.blockpartition.solve(times, stages))
        ), "its block partition of our profile: its own has no skips"
