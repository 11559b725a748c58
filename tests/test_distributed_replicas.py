"""Data parallelism: replicas of a pipeline over a mesh."""

import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import Sometimes, assert_same, gradients, make_pipe
from test_exact import data, net
from test_tied import language_model, tokens
from test_tied import loss_fn as of_tokens
from test_train_step import LearnedLoss
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from worlds import Raised, World

from gpipe.distributed import DistributedGPipe


@pytest.fixture(scope="module")
def four():
    world = World(4)
    yield world
    world.close()


def mesh_of(replicas, stages):
    return init_device_mesh("cpu", (replicas, stages), mesh_dim_names=("dp", "pp"))


def cross_entropy(output, target):
    return F.cross_entropy(output.transpose(1, 2), target)


def wrapped(module, balance, chunks=3, loss_fn=cross_entropy, replicas=2, **options):
    stages = len(balance)
    return DistributedGPipe(
        module, balance, chunks=chunks, loss_fn=loss_fn, seed=7, mesh=mesh_of(replicas, stages), **options
    )


def part(tensor, replica, cuts):
    return tensor[cuts[replica] : cuts[replica + 1]]


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- the mean over all rows -------------------------------------------------------------------------------------------


def train(rank, balance, cuts, options):
    pipe = wrapped(net(0.1), balance, replicas=len(cuts) - 1, **options)
    replica = rank // len(balance)
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        x, y = data(cuts[-1])
        losses.append(pipe.train_step(part(x, replica, cuts), part(y, replica, cuts)))
        optimizer.step()
    return dict(pipe.state_dict()), losses


@pytest.mark.parametrize(("balance", "cuts"), [([4, 2], [0, 6, 12]), ([6], [0, 3, 6, 9, 12])], ids=["2 x 2", "4 x 1"])
@pytest.mark.parametrize(
    ("loss_over", "schedule"), [("mini_batch", "gpipe"), ("micro_batch", "gpipe"), ("micro_batch", "one_f_one_b")]
)
def test_as_one_pipeline_over_all_micro_batches_with_dropout_on(four, balance, cuts, loss_over, schedule):
    options = {"loss_over": loss_over, "schedule": schedule}
    found = four.values(train, balance, cuts, options)
    module = net(0.1)
    pipe = make_pipe(module, balance, chunks=3 * (len(cuts) - 1))
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss = pipe.train_step(*data(12), cross_entropy, loss_over, schedule=schedule)
        for _, told in found:
            torch.testing.assert_close(told[step], loss)
        optimizer.step()
    stages = len(balance)
    for replica in range(len(cuts) - 1):
        states = [state for state, _ in found[replica * stages : (replica + 1) * stages]]
        close({key: value for state in states for key, value in state.items()}, module.state_dict())
        for state, other in zip(states, [state for state, _ in found[:stages]], strict=True):
            assert_same(state, other)  # replicas stay equal to the bit


def uneven(rank):
    pipe = wrapped(net(0.0), [4, 2])
    x, y = data(12)
    cuts = [0, 8, 12]
    replica = rank // 2
    loss = pipe.train_step(part(x, replica, cuts), part(y, replica, cuts))
    pipe.train_step(part(x, replica, cuts), part(y, replica, cuts))
    return loss, gradients(pipe)


def test_uneven_parts_are_weighted_by_rows_and_steps_accumulate(four):
    module = net(0.0)
    loss = cross_entropy(module(data(12)[0]), data(12)[1])
    loss.backward(retain_graph=True)
    loss.backward()
    found = four.values(uneven)
    for told, _ in found:
        torch.testing.assert_close(told, loss.detach())
    close(found[0][1] | found[1][1], gradients(module))
    assert_same(found[2][1] | found[3][1], found[0][1] | found[1][1])


def hold_constant(rank):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].register_buffer("constant", torch.ones(3))
    module[0].register_buffer("own", torch.tensor(float(rank)))
    pipe = wrapped(module, [2], loss_fn=F.mse_loss, replicas=4)
    before = module[0].constant._version
    module[0].own.fill_(rank)
    pipe.train_step(torch.ones(4, 2), torch.ones(4, 2))
    return module[0].constant._version - before, module[0].own


def test_buffers_that_are_equal_are_not_written_to(four):
    """Whoever has used one knows it by its version."""
    assert all(written == 0 and own == 0.0 for written, own in four.values(hold_constant))


def seldom(rank):
    pipe = wrapped(nn.Sequential(Sometimes(), nn.Identity()), [1, 1], 1, lambda y, t: y.mean())
    own = torch.ones(2, 2) if rank < 2 else -torch.ones(2, 2)
    pipe.train_step(own, own)
    return {name: p.grad for name, p in pipe.named_parameters()}, dict(pipe.named_buffers())


def test_a_parameter_that_one_replica_did_not_use_and_buffers(four):
    first, _, third, _ = four.values(seldom)
    for own, buffers in (first, third):
        torch.testing.assert_close(own["0.rare"], torch.full((2,), 0.25))
        torch.testing.assert_close(own["0.weight"], torch.zeros(2))
        assert own["0.never"] is None
        assert buffers["0.seen"] == 4.0  # the first replica's


def low_precision(rank):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    pipe = wrapped(module, [1, 1], 1, lambda y, t: y.float().square().mean())
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(rank // 2)).bfloat16()
    pipe.train_step(x, x)
    return gradients(pipe)


def test_gradients_of_low_precision_are_summed_in_float32(four):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    sums = {}
    for replica in range(2):
        module.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(replica)).bfloat16()
        module(x).float().square().mean().backward()
        sums = {name: sums.get(name, 0) + g.float() for name, g in gradients(module).items()}
    found = four.values(low_precision)
    assert_same(found[0] | found[1], {name: (s / 2).bfloat16() for name, s in sums.items()})


def tied(rank):
    pipe = wrapped(language_model(), [2, 2], 2, of_tokens)
    optimizer = torch.optim.AdamW(pipe.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        pipe.train_step(tokens()[: 4 + rank // 2], tokens()[: 4 + rank // 2])
        norm = pipe.clip_grad_norm_(0.1)
        optimizer.step()
    return dict(pipe.state_dict()), norm


def test_tied_parameters_and_clipping(four):
    found = four.values(tied)
    for (state, norm), (other, other_norm) in zip(found[:2], found[2:], strict=True):
        assert_same(state, other)
        assert torch.equal(norm, other_norm)
    assert torch.equal(found[0][0]["0.weight"], found[1][0]["3.weight"])
    assert torch.equal(found[0][1], found[1][1])


def learn_the_loss(rank, loss_over):
    torch.manual_seed(rank)  # other weights everywhere: the first replica's count
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    pipe = wrapped(module, [1, 2], 2, LearnedLoss(), loss_over=loss_over)
    start = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    x = torch.full((6, 4), 1.0 + rank // 2)
    pipe.train_step(x, torch.zeros(6, 4))
    return start, gradients(pipe)


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_a_loss_with_parameters_and_other_weights_on_every_rank(four, loss_over):
    found = four.values(learn_the_loss, loss_over)
    for one, other in zip(found[:2], found[2:], strict=True):
        assert_same(one[0], other[0])
        assert_same(one[1], other[1])
    assert "loss_fn.scale" in found[1][1]


# --- scaled losses ----------------------------------------------------------------------------------------------------


def scaled(rank, loss_over, overflow_at):
    pipe = wrapped(net(0.0), [4, 2], loss_over=loss_over)
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    scaler = ShardedGradScaler("cpu", init_scale=1024.0, growth_interval=100)
    x, y = data(12)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        losses.append(pipe.train_step(x, y, scaler=scaler))
        if step == 1 and rank == overflow_at:
            next(pipe.parameters()).grad.fill_(float("inf"))
        scaler.unscale_(optimizer)
        if step != 1:
            pipe.clip_grad_norm_(0.5)
        scaler.step(optimizer)
        scaler.update()
    return dict(pipe.state_dict()), losses, scaler.get_scale()


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_a_scaled_loss_gives_the_same_and_all_ranks_skip_together(four, loss_over):
    found = four.values(scaled, loss_over, 1)
    module = net(0.0)
    pipe = make_pipe(module, [4, 2], 3)
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss = pipe.train_step(*data(12), cross_entropy, loss_over)
        assert all(torch.equal(told[step], loss) for _, told, _ in found)
        nn.utils.clip_grad_norm_(pipe.parameters(), 0.5)
        if step != 1:
            optimizer.step()
    close(found[0][0] | found[1][0], module.state_dict())
    assert {scale for _, _, scale in found} == {512.0}


def autocast(rank):
    pipe = wrapped(net(0.0), [4, 2])
    with torch.autocast("cpu", torch.bfloat16):
        pipe.train_step(*data(12))
    return gradients(pipe)


def test_autocast(four):
    module = net(0.0)
    pipe = make_pipe(module, [4, 2], 3)
    with torch.autocast("cpu", torch.bfloat16):
        pipe.train_step(*data(12), cross_entropy)
    found = four.values(autocast)
    assert_same(found[0] | found[1], gradients(module))  # both replicas have the same rows


# --- failures and arguments -------------------------------------------------------------------------------------------


def fail(rank, at):
    pipe = wrapped(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [1, 1], 2, lambda y, t: y.mean())
    x = torch.ones(4, 4)
    pipe.train_step(x, x)
    if rank == at:
        pipe._cells[0][1].register_forward_hook(lambda *_: 1 / 0)
    try:
        pipe.train_step(x, x)
    except Exception as error:
        found = Raised(error, 0.0)
    start = time.monotonic()
    if rank == at:
        time.sleep(6)  # user code that caught it and lives on
    else:
        dist.destroy_process_group()
    return found, time.monotonic() - start


@pytest.mark.parametrize("at", [0, 3])
def test_a_failure_ends_every_replica(at):
    world = World(4)
    try:
        for rank, (raised, seconds) in enumerate(world.values(fail, at)):
            assert raised.type == ("ZeroDivisionError" if rank == at else "OtherRankFailed")
            assert rank == at or f"rank {at} failed in step 1 with ZeroDivisionError" in raised.message
            assert rank == at or seconds < 4  # nobody waits for sums the failed rank has no part in
    finally:
        world.kill()


def freeze(rank):
    pipe = wrapped(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [1, 1], 2, lambda y, t: y.mean())
    if rank == 2:
        next(pipe.parameters()).requires_grad_(False)
    pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))


def test_freezing_later_is_refused(four):
    for raised in four.run(freeze):
        assert "requires_grad of some was changed since: set it before, or make a new pipe" in raised.message


def refuse(rank, shape, names):
    mesh = (
        DeviceMesh("cpu", torch.arange(4).reshape(shape))
        if names is None
        else init_device_mesh("cpu", shape, mesh_dim_names=names)
    )
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    pipe = DistributedGPipe(module, chunks=2, loss_fn=lambda y, t: y.mean(), mesh=mesh)
    pipe.train_step(torch.ones(4, 4), torch.ones(4, 4))
    return list(pipe.state_dict())


def test_meshes(four):
    def keys(*cells):
        return [f"{c}.{n}" for c in cells for n in ("weight", "bias")]

    assert four.values(refuse, (4,), None) == [keys(0), keys(1), keys(2), keys(3)]
    assert four.values(refuse, (2, 2), None) == [keys(0, 1), keys(2, 3)] * 2
    by_column = four.values(refuse, (2, 2), ("pp", "dp"))
    assert by_column == [keys(0, 1), keys(0, 1), keys(2, 3), keys(2, 3)]
    for raised in four.run(refuse, (1, 2, 2), None):
        assert "mesh must have one dimension, the pipeline, or two, replicas and pipeline; it has 3" in raised.message


def too_small(rank):
    mesh = DeviceMesh("cpu", torch.arange(2))
    DistributedGPipe(nn.Sequential(nn.Linear(4, 4)), chunks=2, loss_fn=lambda y, t: y.mean(), mesh=mesh)


def test_a_mesh_that_does_not_fit_the_world(four):
    for raised in four.run(too_small):
        assert "the world has 4 ranks and the mesh is [0, 1]: start 2 processes, or make a mesh whose" in raised.message
