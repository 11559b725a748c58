"""The promises on accelerators: several stages on one device, and one stage a device where there are several."""

import copy

import pytest
import torch
import torch.distributed as dist
from nets import accelerator, assert_same
from torch import nn
from worlds import World

import gpipe
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]


@pytest.fixture
def deterministic():
    """Not with ``warn_only``: attention's backward is then as nondeterministic as ever, and warns."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def placements():
    """Every stage on the first device; and, where there are several, round robin over them."""
    one = [[accelerator()] * k for k in (1, 2, 3)]
    count = torch.accelerator.device_count()
    return one + ([[accelerator(k % count) for k in range(3)]] if count > 1 else [])


def net(dropout=0.1):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(64, 4, 128, dropout, batch_first=True) for _ in range(3)),
    )


def trained(devices, checkpoint, dtype=None):
    module = net()
    pipe = gpipe.GPipe(
        module, [[3], [1, 2], [1, 1, 1]][len(devices) - 1], devices=devices, chunks=4, checkpoint=checkpoint, seed=3
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-3)
    x = torch.randn(11, 16, 64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(accelerator().type, torch.bfloat16, enabled=dtype is not None):
            y = pipe(x)
        y.float().square().mean().backward()
        optimizer.step()
    return {k: v.cpu() for k, v in pipe.state_dict().items()}


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_same_bits_for_every_placement_and_checkpoint(dtype):
    expected = trained([accelerator()], "never", dtype)
    for devices in placements():
        for checkpoint in ("always", "except_last", "never"):
            found = trained(devices, checkpoint, dtype)
            assert all(torch.equal(expected[k], found[k]) for k in expected), (devices, checkpoint)


def test_gradients_equal_the_unpipelined_models():
    module = net(dropout=0.0).double()
    plain = copy.deepcopy(module).to(accelerator())
    x = torch.randn(10, 5, 64, dtype=torch.float64)
    plain(x.to(accelerator())).square().sum().backward()
    pipe = gpipe.GPipe(module, [2, 1], devices=[accelerator()] * 2, chunks=3)
    pipe(x).square().sum().backward()
    for p, q in zip(plain.parameters(), pipe.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10)


def test_backward_from_an_engine_thread_does_not_wait_for_itself():
    """The loss lives on the device of both stages, so autograd's thread of that device runs part of the backward."""
    pipe = gpipe.GPipe(net(), [1, 2], devices=[accelerator()] * 2, chunks=4)
    for _ in range(5):
        (pipe(torch.randn(8, 4, 64)) * torch.ones(64, device=accelerator())).sum().backward()


def test_the_callers_streams_and_default_generator():
    pipe = gpipe.GPipe(net(), [1, 2], devices=[accelerator()] * 2, chunks=4, seed=1)
    module = torch.get_device_module(accelerator())
    state = module.get_rng_state()
    x = torch.randn(8, 4, 64)
    expected = pipe(x).detach()
    assert torch.equal(state, module.get_rng_state())
    pipe.step = 0
    with torch.Stream(accelerator()) as stream:
        found = pipe(x).detach()
    stream.synchronize()
    assert torch.equal(expected, found)


def test_memory_is_that_of_one_micro_batch_when_nothing_is_kept():
    def peak(checkpoint):
        """Beyond what stays: parameters, gradients, and the workspaces of cuBLAS, larger than the activations here."""
        pipe = gpipe.GPipe(net(0.0), [3], devices=[accelerator()], chunks=16, checkpoint=checkpoint)
        pipe(torch.randn(64, 64, 64)).sum().backward()
        torch.accelerator.synchronize()
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        pipe(torch.randn(64, 64, 64)).sum().backward()
        return torch.accelerator.max_memory_allocated() - before

    assert peak("always") < 0.6 * peak("never")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("schedule", ["gpipe_zero_bubble", "one_f_one_b", "zero_bubble_h1"])
def test_schedules_give_the_same_bits_for_every_placement(schedule):
    found = []
    for devices in placements():
        module = net()
        balance = [[3], [1, 2], [1, 1, 1]][len(devices) - 1]
        pipe = gpipe.GPipe(module, balance, devices=devices, chunks=4, checkpoint="never", seed=3)
        x = torch.randn(11, 16, 64, generator=torch.Generator().manual_seed(1))
        pipe.train_step(x, x, nn.functional.mse_loss, "micro_batch", schedule=schedule)
        found.append({name: p.grad.cpu() for name, p in module.named_parameters()})
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_profiled_bytes_are_near_the_allocators():
    module, x = net(0.0), torch.randn(256, 64, 64)
    net(0.0).to(accelerator())(x[:4].to(accelerator())).sum().backward()  # cuBLAS has its workspaces, in both threads
    costs = profile(module, x, device=accelerator(), chunks=4, repeats=1)
    predicted = predict(costs, [3], micro_batches=4, keep=4, input_bytes=x.nbytes // 4).bytes[0]
    pipe = gpipe.GPipe(module, [3], devices=[accelerator()], chunks=4, checkpoint="never")
    optimizer = torch.optim.Adam(pipe.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        outputs = pipe(x)
        outputs.square().mean().backward()
        optimizer.step()
    state = 3 * sum(p.nbytes for p in module.parameters())
    measured = torch.accelerator.max_memory_allocated() - before + state
    assert predicted == pytest.approx(measured, rel=0.15)


def test_bytes_over_time_are_for_the_cpu():
    pipe = gpipe.GPipe(net(), [1, 2], devices=[accelerator()] * 2)
    with pytest.raises(ValueError, match="counts storages on the CPU"), gpipe.record(pipe, memory=True):
        pass


# --- ranks ------------------------------------------------------------------------------------------------------------


def steps(pipe, train_step):
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-3)
    for rows in (11, 11, 3):  # the last mini-batch has other shapes
        optimizer.zero_grad()
        x = torch.randn(rows, 16, 64, generator=torch.Generator().manual_seed(rows))
        train_step(x, x)
        optimizer.step()
    return {k: v.cpu() for k, v in pipe.state_dict().items()}


def train_on_rank(rank, devices, schedule):
    torch.use_deterministic_algorithms(True)
    mse = nn.functional.mse_loss
    options = {"chunks": 4, "seed": 3, "device": devices[rank], "loss_over": "micro_batch", "schedule": schedule}
    pipe = gpipe.DistributedGPipe(net(), [1, 2], loss_fn=mse, **options)
    state = steps(pipe, pipe.train_step)
    pipe.eval()
    pipe(torch.ones(5, 16, 64))
    routes = [end.route for end in (*pipe._calls.wires.outgoing.values(), *pipe._calls.wires.incoming.values())]
    return state, sum(route.direct is not None for route in routes)


def the_same_bits_as_threads(world, devices, schedule, straight):
    pipe = gpipe.GPipe(net(), [1, 2], devices=devices, chunks=4, seed=3)
    mse = nn.functional.mse_loss
    expected = steps(pipe, lambda x, y: pipe.train_step(x, y, mse, "micro_batch", schedule=schedule))
    found = world.values(train_on_rank, devices, schedule, seconds=120)
    assert_same(found[0][0] | found[1][0], expected)
    assert [count for _, count in found] == [straight, straight]


@pytest.fixture
def sharing():
    world = World(2)
    yield world
    world.close()


@pytest.fixture
def over_nccl():
    world = World(2, "cpu:gloo,cuda:nccl")
    yield world
    world.close()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
def test_two_ranks_share_one_device_through_gloo(sharing, schedule):
    the_same_bits_as_threads(sharing, [accelerator(), accelerator()], schedule, straight=0)


NCCL = pytest.mark.skipif(
    accelerator().type != "cuda" or not dist.is_nccl_available(), reason="needs NCCL and a CUDA device"
)
SEVERAL = pytest.mark.skipif(
    accelerator().type != "cuda" or torch.cuda.device_count() < 2 or not dist.is_nccl_available(),
    reason="needs NCCL and two CUDA devices, a rank each",
)


@pytest.mark.usefixtures("deterministic")
@SEVERAL
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
def test_two_ranks_with_a_device_each_over_nccl(over_nccl, schedule):
    the_same_bits_as_threads(over_nccl, [accelerator(0), accelerator(1)], schedule, straight=2)


@pytest.mark.usefixtures("deterministic")
@NCCL
def test_ranks_with_nccl_that_share_a_device_do_not_use_it(over_nccl):
    the_same_bits_as_threads(over_nccl, [accelerator(), accelerator()], "gpipe", straight=0)
