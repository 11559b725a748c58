"""Ways to train a model on two CPU cores, each behind the same door: ours, plain loops, and the peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gpipe
from benchmarks.models import NETS, Net, parts
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.live import LiveBytes

STAGES = 2


@dataclass(frozen=True)
class Contender:
    """What is trained, by what, and how. Every rank makes its part of it.

    Attributes:
        door: A key of ``benchmarks.doors.DOORS``.
        net: Name of the model.
        chunks: Number of micro-batches M.
        size: A key of ``NETS``.
        balance: Cells per stage.
        schedule: By the door's own name for it.
        recompute: By the door's own name for it: ``checkpoint`` of ours, torchgpipe's and fairscale's; for torch's, and
            for plain loops, ``"never"``, ``"cells"`` or ``"stage"``: what torch.utils.checkpoint is put around.
        threads: Intra-op threads of the process.
    """

    door: str
    net: str
    chunks: int
    size: str = "full"
    balance: tuple[int, ...] = ()
    schedule: str = "gpipe"
    recompute: str | tuple[int, ...] = "never"
    threads: int = 1

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.balance)

    def trains(self) -> Net:
        """The model."""
        return NETS[self.size][self.net]


@dataclass(frozen=True)
class Running:
    """A contender's part on one rank.

    Attributes:
        step: Forward, loss and backward of a mini-batch, without the optimizer's step.
        parameters: Those of this process, the loss's included.
        peaks: Two steps, the first ever; then by stage the bytes it held at most in the second: parameters,
            gradients, inputs and all that its operators make.
    """

    step: Callable[[], None]
    parameters: Sequence[nn.Parameter]
    peaks: Callable[[], dict[int, int]]


Door = Callable[[int, Contender], Running]


def idle() -> Running:
    """A rank that has nothing to do."""
    return Running(lambda: None, [], dict)


def own_bytes(modules: Sequence[nn.Module]) -> int:
    """Bytes of the parameters and buffers of ``modules``."""
    return sum(t.nbytes for m in modules for t in [*m.parameters(), *m.buffers()])


def tensor_bytes(tree: Any) -> int:
    """Bytes of the tensors in ``tree``."""
    return sum(t.nbytes for t in tree_leaves(tree) if isinstance(t, Tensor))


def counted(
    step: Callable[[], None], stage: int, modules: Sequence[nn.Module], inputs: Any = ()
) -> Callable[[], dict[int, int]]:
    """``Running.peaks`` where all of ``stage``'s operators run in the thread that calls ``step``.

    Args:
        step: Made, and never called before.
        stage: The stage.
        modules: What belongs to it.
        inputs: The mini-batch, on the first stage, where it lies all step long.
    """

    def peaks() -> dict[int, int]:
        with LiveBytes() as meter:
            step()
            meter.restart()
            step()
        return {stage: meter.peak + own_bytes(modules) + tensor_bytes(inputs)}

    return peaks


def recorded(pipe: Any, step: Callable[[], None], buffers: Mapping[int, int]) -> Callable[[], dict[int, int]]:
    """``Running.peaks`` of our pipes; ``buffers`` are the bytes of each stage's, which a record leaves out."""

    def peaks() -> dict[int, int]:
        step()
        with gpipe.record(pipe, memory=True) as timeline:
            step()
        return {stage: timeline.peak_bytes[stage] + size for stage, size in buffers.items()}

    return peaks


def buffer_bytes(module: nn.Module, balance: Sequence[int]) -> dict[int, int]:
    """Bytes of the buffers of every stage."""
    cells = iter(cells_of(module))
    return {
        k: sum(b.nbytes for _, cell in islice(cells, size) for b in cell.buffers()) for k, size in enumerate(balance)
    }


def with_threads(count: int, step: Callable[[], None]) -> Callable[[], None]:
    """``step`` with so many intra-op threads, one before and after."""

    def run() -> None:
        torch.set_num_threads(count)
        try:
            step()
        finally:
            torch.set_num_threads(1)

    return step if count == 1 else run


def accumulate(module: nn.Module, x: Any, y: Tensor, chunks: int, loss: Callable[..., Tensor]) -> Callable[[], None]:
    """The plain loop: forward, loss and backward of each micro-batch, gradients accumulated."""

    def step() -> None:
        module.zero_grad()
        for part, target in zip(parts(x, chunks), parts(y, chunks), strict=True):
            (loss(module(part), target) / chunks).backward()  # type: ignore[no-untyped-call]

    return step


def plain(rank: int, contender: Contender) -> Running:
    """The whole model on rank 0 alone."""
    if rank:
        return idle()
    net = contender.trains()
    module, loss = net.made()
    cells = nn.Sequential(*(Checkpointed(cell) for _, cell in cells_of(module)))
    body = cells if contender.recompute == "cells" else module
    both = nn.ModuleList([body, loss])
    x, y = net.batch()
    run = accumulate(body, x, y, contender.chunks, loss)

    def step() -> None:
        loss.zero_grad()
        run()

    step = with_threads(contender.threads, step)
    return Running(step, list(both.parameters()), counted(step, 0, [both], x))


class Checkpointed(nn.Module):
    """A cell that torch.utils.checkpoint runs again in backward."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, inputs: Any) -> Any:
        """As the cell."""
        from torch.utils.checkpoint import checkpoint

        return checkpoint(self.cell, inputs, use_reentrant=False, preserve_rng_state=False)


def on_threads(rank: int, contender: Contender) -> Running:
    """All stages in rank 0, one intra-op thread each."""
    if rank:
        return idle()
    net = contender.trains()
    module, loss = net.made()
    x, y = net.batch()
    torch.set_num_threads(contender.stages)
    pipe = gpipe.GPipe(
        module,
        contender.balance,
        devices=["cpu"] * contender.stages,
        chunks=contender.chunks,
        checkpoint=_checkpoint(contender),
        seed=0,
    )
    torch.set_num_threads(1)

    def step() -> None:
        pipe.zero_grad()
        loss.zero_grad()
        pipe.train_step(x, y, loss, loss_over="micro_batch", schedule=contender.schedule)

    return Running(
        step, [*pipe.parameters(), *loss.parameters()], recorded(pipe, step, buffer_bytes(module, contender.balance))
    )


def _checkpoint(contender: Contender) -> Any:
    return list(contender.recompute) if isinstance(contender.recompute, tuple) else contender.recompute


def on_ranks(rank: int, contender: Contender) -> Running:
    """A stage a rank."""
    net = contender.trains()
    module, loss = net.made()
    x, y = net.batch()
    pipe = gpipe.DistributedGPipe(
        module,
        contender.balance,
        chunks=contender.chunks,
        loss_fn=loss,
        loss_over="micro_batch",
        schedule=contender.schedule,
        checkpoint=_checkpoint(contender),
        seed=0,
        device="cpu",
    )

    def step() -> None:
        pipe.zero_grad()
        pipe.train_step(x, y)

    return Running(step, list(pipe.parameters()), recorded(pipe, step, {rank: sum(b.nbytes for b in pipe.buffers())}))
