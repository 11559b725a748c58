"""A check for a user's own CI: does this module train the same as a pipeline, to the last bit?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from gpipe.microbatch import gather, scatter
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.split import split_evenly
from gpipe.pipe import GPipe
from gpipe.rng import cell_seed
from gpipe.settings import Checkpoint

LossOverOutputs = Callable[[Any], Tensor]


def assert_exact(
    module: nn.Module,
    sample: Any,
    *,
    stages: Iterable[int] = (1, 2, 3),
    chunks: int = 4,
    checkpoints: Sequence[Checkpoint] = ("always", "except_last", "never"),
    loss_fn: LossOverOutputs | None = None,
    steps: int = 2,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> None:
    """Assert that ``module`` trains as a pipeline exactly as in a plain loop over the micro-batches.

    Copies of the module are trained on the CPU for a few steps of gradient descent: by the plain loop, and by ``GPipe``
    for every number of stages and every checkpoint mode. Outputs, gradients, parameters and buffers must be equal to
    the last bit. Stage counts beyond the number of cells are left out.

    Args:
        module: What ``GPipe`` would wrap; it is not changed.
        sample: An input (rows, ...) for it.
        stages: Numbers of stages to try.
        chunks: Number of micro-batches.
        checkpoints: Checkpoint modes to try.
        loss_fn: The loss from the outputs; by default the mean of the squares of all floating-point outputs.
        steps: Optimiser steps.
        learning_rate: Of the gradient descent.
        seed: Base seed of random draws in the cells.

    Raises:
        AssertionError: Naming the first tensor that differs, where, and by how much.
    """
    loss_fn = loss_fn or _mean_square
    cells = len(cells_of(module))
    with _one_intra_op_thread():
        plain = _Plain(copy.deepcopy(module), chunks, seed)
        expected = _train(plain, plain.module, sample, loss_fn, steps, learning_rate)
        for count in stages:
            if count > cells:
                continue
            for checkpoint in checkpoints:
                replica = copy.deepcopy(module)
                balance = split_evenly([1.0] * cells, count)
                pipe = GPipe(replica, balance, devices=["cpu"] * count, chunks=chunks, checkpoint=checkpoint, seed=seed)
                found = _train(pipe, replica, sample, loss_fn, steps, learning_rate)
                _compare(expected, found, f"balance {balance}, checkpoint {checkpoint!r}")


class _Plain:
    """The plain loop: every micro-batch through all cells, draws seeded as the pipeline seeds them."""

    def __init__(self, module: nn.Module, chunks: int, seed: int) -> None:
        self.module = module
        self._cells = cells_of(module)
        self._chunks = chunks
        self._seed = seed
        self._step = 0
        self._outputs: list[list[tuple[Tensor, Tensor]]] = []  # per micro-batch (made by cells, given to the loss)

    def __call__(self, inputs: Any) -> Any:
        given = []
        with torch.random.fork_rng(devices=[]):
            for m, value in enumerate(scatter(inputs, self._chunks)):
                for i, (_, cell) in enumerate(self._cells):
                    torch.manual_seed(cell_seed(self._seed, self._step, m, i))
                    value = cell(value)
                self._outputs.append([])
                given.append(tree_map_only(Tensor, self._cut, value))
        self._step += self.module.training
        return gather(given)

    def backward(self) -> None:
        """Continue the loss's backward through the cells, the last micro-batch first."""
        while self._outputs:
            pairs = [(made, given.grad) for made, given in self._outputs.pop() if given.grad is not None]
            torch.autograd.backward([made for made, _ in pairs], [gradient for _, gradient in pairs])

    def _cut(self, made: Tensor) -> Tensor:
        if not made.requires_grad:
            return made
        given = made.detach().requires_grad_()
        self._outputs[-1].append((made, given))
        return given


def _train(
    run: Callable[[Any], Any], module: nn.Module, sample: Any, loss_fn: LossOverOutputs, steps: int, rate: float
) -> list[tuple[str, Tensor]]:
    """Train for a few steps; every tensor worth comparing, with its name, in order of appearance."""
    seen: list[tuple[str, Tensor]] = []
    for step in range(steps):
        module.zero_grad()
        output = run(copy.deepcopy(sample))
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        seen += [(f"step {step}: output {i}", leaf.detach().clone()) for i, leaf in enumerate(leaves)]
        loss_fn(output).backward()  # type: ignore[no-untyped-call]
        if isinstance(run, _Plain):
            run.backward()
        for name, p in module.named_parameters():
            if p.grad is not None:
                seen.append((f"step {step}: gradient of {name}", p.grad.clone()))
                p.data.add_(p.grad, alpha=-rate)
    seen += [(f"after {steps} steps: {name}", value.clone()) for name, value in module.state_dict().items()]
    return seen


def _compare(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]], where: str) -> None:
    names = [name for name, _ in expected]
    others = [name for name, _ in found]
    if names != others:
        odd = sorted(set(names) ^ set(others))
        raise AssertionError(f"{where}: these exist in only one of plain loop and pipeline: {', '.join(odd[:5])}")
    for (name, a), (_, b) in zip(expected, found, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise AssertionError(f"{where}: {name} is {tuple(b.shape)} {b.dtype}, plain {tuple(a.shape)} {a.dtype}")
        if not torch.equal(a.nan_to_num(), b.nan_to_num()) or not torch.equal(a.isnan(), b.isnan()):
            apart = (a.double() - b.double()).abs().max().item()
            raise AssertionError(
                f"{where}: {name} differs from the plain loop by up to {apart:.3g}. A cell that keeps state outside "
                "its buffers, or draws random numbers outside torch, can do this"
            )


def _mean_square(output: Any) -> Tensor:
    floats = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not floats:
        raise ValueError(
            "no output requires a gradient: give loss_fn, or check that the module has trainable parameters"
        )
    return torch.stack([leaf.square().mean() for leaf in floats]).sum()


@contextmanager
def _one_intra_op_thread() -> Iterator[None]:
    """Results depend on how an operator splits its sums over threads: the same number for all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
