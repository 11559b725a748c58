"""Regressions of DistributedGPipe where features meet: above each test what went wrong."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from worlds import World

from gpipe.distributed import DistributedGPipe


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


def mesh_of(replicas, stages):
    return init_device_mesh("cpu", (replicas, stages), mesh_dim_names=("dp", "pp"))


def squared(y, t):
    return (y - t).square().mean()


class Holds(nn.Linear):
    """A cell with a buffer."""

    def __init__(self, buffer):
        super().__init__(4, 4)
        self.register_buffer("held", buffer)


BUFFERS = {
    "sliced": lambda values: values.view(3, 4)[:, :2],
    "transposed": lambda values: values.view(3, 4).t(),
    "expanded": lambda values: values[:4].expand(3, 4),
    "int16": lambda values: values.to(torch.int16),
    "float8": lambda values: values.to(torch.float8_e4m3fn),
    "conjugate": lambda values: torch.complex(values, values).conj(),
    "empty": lambda values: values[:0],
    "bool": lambda values: values > 105,
}


def hold(rank, kind):
    pipe = DistributedGPipe(
        nn.Sequential(Holds(BUFFERS[kind](torch.arange(12.0) + 100 * rank))),
        chunks=1,
        loss_fn=squared,
        mesh=mesh_of(2, 1),
    )
    held = next(pipe.buffers())
    return held.is_conj(), held.stride(), held.resolve_conj().reshape(-1).contiguous().view(torch.uint8).numpy()


# Broadcast through gloo took a buffer for plain, dense memory, whatever its strides: other replicas got a mixture of
# values, written past the end of an expanded one. Types that gloo does not know ended as "a replica cannot be reached".
@pytest.mark.parametrize("kind", BUFFERS)
def test_replicas_get_buffers_of_every_type_and_layout(two, kind):
    expected = BUFFERS[kind](torch.arange(12.0))
    for conjugate, stride, found in two.values(hold, kind):
        assert (conjugate, stride) == (expected.is_conj(), expected.stride())
        assert (found == expected.resolve_conj().reshape(-1).contiguous().view(torch.uint8).numpy()).all()


class Homeless(nn.Linear):
    """A cell for which its device has no room."""

    def _apply(self, fn, recurse=True):
        raise MemoryError("no room")


def move_in(rank):
    DistributedGPipe(nn.Sequential(nn.Linear(4, 4), Homeless(4, 4)), [1, 1], chunks=1, loss_fn=squared)


# What one rank alone could not do when it took its slice (memory, initial values of a factory) was raised there, and
# the others waited for it for ever.
def test_a_rank_that_cannot_take_its_stages_ends_all(two):
    first, second = two.run(move_in)
    assert (second.type, second.message) == ("MemoryError", "no room")
    assert (first.type, first.message) == ("ValueError", "rank 1 failed to take its stages: MemoryError: no room")
