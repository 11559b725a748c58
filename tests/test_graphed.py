"""Cells that run as CUDA graphs are refused: micro-batches would overwrite each other's activations."""

import inspect
import re

import pytest
import torch
from nets import linears, make_pipe
from torch import nn
from worlds import Raised, World

import gpipe

REFUSED = r"cell 1\.0 \(Linear\) runs as a CUDA graph \(torch.cuda.make_graphed_callables\).*Wrap the module as it was"


def make_graphed_callables(module):
    """Leaves on a module what its namesake in torch leaves."""
    forward = module.forward

    def new_fwd(*args):
        return forward(*args)

    module.forward = new_fwd
    return module


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))


def test_torch_leaves_on_a_module_what_these_tests_do():
    source = inspect.getsource(torch.cuda.make_graphed_callables)
    assert re.search(r"func\.forward = make_graphed_forward\(", source)
    assert re.search(r"\n +def make_graphed_forward\((.|\n)*?def new_fwd\(", source)
    assert re.search(r"\n        def functionalized\(", source)


def test_graphed_before_wrapping():
    module = net()
    make_graphed_callables(module[1][0])
    with pytest.raises(RuntimeError, match=REFUSED):
        make_pipe(module)


def test_graphed_after_wrapping():
    module = net()
    pipe = make_pipe(module)
    make_graphed_callables(module[1][0])
    with pytest.raises(RuntimeError, match=REFUSED):
        pipe(torch.ones(6, 4))


def test_a_graphed_function_that_a_cell_calls():
    module = linears(2)
    module[1].run = make_graphed_callables(nn.Tanh()).forward
    with pytest.raises(RuntimeError, match=r"cell 1 \(Linear\) runs as a CUDA graph"):
        make_pipe(module)


def refused(rank, when):
    module = net()
    part = module[1][0]  # which a slice of the module no longer gives
    if when == "before":
        make_graphed_callables(part)
    pipe = gpipe.DistributedGPipe(module, [1, 1], chunks=3, loss_fn=nn.functional.mse_loss, device="cpu")
    if rank == 1:
        make_graphed_callables(part)
    pipe.train_step(torch.ones(6, 4), torch.ones(6, 4))


@pytest.mark.parametrize(("when", "first"), [("before", REFUSED), ("after", r"rank 1.*runs as a CUDA graph")])
def test_graphed_on_ranks(when, first):
    world = World(2)
    try:
        found = world.run(refused, when, seconds=60)
    finally:
        world.close()
    assert all(isinstance(result, Raised) for result in found)
    assert re.search(first, found[0].text, re.DOTALL)
    assert re.search(REFUSED, found[1].text, re.DOTALL)
