"""Regressions of DistributedGPipe where features meet: above each test what went wrong."""

import pytest
import torch
from nets import FrozenNorms, Shifted, assert_same, gradients
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


class Fussy(nn.Linear):
    """A cell that refuses large inputs."""

    def forward(self, x):
        if x.abs().max() > 1e6:
            raise ValueError("too large")
        return super().forward(x)


def fail_and_start_again(rank):
    mesh, x = mesh_of(2, 2), torch.ones(4, 4)
    found = []
    for scale in (1e9, 1.0):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), Fussy(4, 4))
        pipe = DistributedGPipe(module, [1, 1], chunks=1, loss_fn=squared, mesh=mesh)
        try:
            pipe.eval()(x * (scale if rank == 0 else 1.0))
            found.append(pipe.train().train_step(x, x))
        except (ValueError, RuntimeError) as error:
            found.append(str(error))
    return found


# Replicas that had begun a step when an earlier call failed elsewhere left a sum behind in the mesh's group, and the
# new pipe that the message recommends met it there: its ranks waited for ever.
def test_a_new_pipe_on_the_same_mesh_after_a_failure():
    world = World(4)
    try:
        found = world.values(fail_and_start_again)
    finally:
        world.kill()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for told, loss in found:
        assert "too large" in told
        torch.testing.assert_close(loss, squared(module(torch.ones(4, 4)), torch.ones(4, 4)).detach())


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(Fussy(4, 4), nn.BatchNorm1d(4))


def rows_of(replica):
    return torch.arange(16.0).view(4, 4) * (1 + replica)


def forward_in_training_mode(rank, fails):
    pipe = DistributedGPipe(normalised(), chunks=1, loss_fn=squared, mesh=mesh_of(2, 1))
    pipe(rows_of(rank) * (1e9 if fails and rank else 1.0))
    return {name: buffer.clone() for name, buffer in pipe.named_buffers()}


# Running statistics that a forward in training mode updated stayed different on every replica, and a save took any.
def test_buffers_of_a_forward_in_training_mode_are_the_first_replicas(two):
    first, second = two.values(forward_in_training_mode, False)
    module = normalised()
    module(rows_of(0))
    assert_same(first, dict(module.named_buffers()))
    assert_same(second, first)


def test_a_failure_of_a_forward_in_training_mode_ends_every_replica(two):
    first, second = two.run(forward_in_training_mode, True)
    assert (first.type, second.type) == ("OtherRankFailed", "ValueError")


class Learned(nn.Linear):
    """A loss whose parameter a mean over no rows makes no number of."""

    def forward(self, y, t):
        return squared(super().forward(y), t)


def without_rows(rank, rows, loss_over):
    torch.manual_seed(0)
    module, loss_fn = nn.Sequential(nn.Linear(4, 4)), Learned(4, 4)
    pipe = DistributedGPipe(module, chunks=2, loss_fn=loss_fn, loss_over=loss_over, mesh=mesh_of(2, 1))
    x = torch.arange(12.0).view(3, 4)[: rows[rank]]
    return pipe.train_step(x, x), gradients(pipe)


# A replica without rows, as in the last batch of an epoch, made the loss of all of them NaN.
@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
@pytest.mark.parametrize("rows", [(3, 0), (0, 3)])
def test_a_replica_without_rows_does_not_count(two, rows, loss_over):
    torch.manual_seed(0)
    module, loss_fn, x = nn.Linear(4, 4), Learned(4, 4), torch.arange(12.0).view(3, 4)
    loss = loss_fn(module(x), x)
    loss.backward()
    expected = [*gradients(module).values(), *gradients(loss_fn).values()]
    for told, found in two.values(without_rows, rows, loss_over):
        torch.testing.assert_close(told, loss.detach())
        for gradient, whole in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(gradient, whole)


def embed(rank):
    module = nn.Sequential(nn.Embedding(5, 4, sparse=True))
    pipe = DistributedGPipe(module, chunks=1, loss_fn=squared, mesh=mesh_of(2, 1))
    pipe.train_step(torch.tensor([0, 1]), torch.ones(2, 4))


# It ended with "reshape is not implemented for sparse tensors".
def test_sparse_gradients_of_replicas_are_refused(two):
    for raised in two.run(embed):
        assert "replicas average dense gradients, but that of a parameter of shape (5, 4) is sparse" in raised.message


def trained_by_itself(rank):
    pipe = DistributedGPipe(FrozenNorms(nn.Linear(4, 4), nn.BatchNorm1d(4)), chunks=1, loss_fn=squared)
    pipe.train()
    return pipe.training, [module.training for module in pipe.children()]


# A train() of the module's own was never called.
def test_a_module_has_a_training_mode_of_its_own(two):
    assert two.values(trained_by_itself) == [(True, [True]), (True, [False])]


def hooked(rank):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pipe = DistributedGPipe(module, chunks=1, loss_fn=squared)
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="the wrapped module has forward or backward hooks, which train_step would"):
        pipe.train_step(torch.ones(2, 4), torch.ones(2, 4))


# They were passed over without a word.
def test_hooks_of_the_whole_module_are_refused(two):
    two.values(hooked)


def cast(rank):
    pipe = DistributedGPipe(Shifted(), chunks=1, loss_fn=squared).bfloat16()
    return pipe(torch.ones(2, 4, dtype=torch.bfloat16))


# A cast reached the module's buffer alone.
def test_a_buffer_that_new_cells_share_is_cast(two):
    assert two.values(cast)[1].dtype == torch.bfloat16
