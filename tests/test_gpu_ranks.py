"""Ranks with an accelerator each: tensors go straight from one to the other, and no host waits for a device."""

import functools
import os
import signal
import time
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from nets import Apply, Bomb, Sometimes, assert_same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from worlds import Raised, World

import gpipe
from gpipe import lanes
from gpipe.ranks.direct import Direct
from gpipe.ranks.error_board import OtherRankFailed
from gpipe.ranks.group_transport import Wires
from gpipe.ranks.routes import Route
from gpipe.skip import pop, skippable, stash
from gpipe.testing import accelerators
from gpipe.transport import Direction

SIMULATED = accelerators.started()
KIND = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
CARRIER = {"sim": "simccl", "cuda": "nccl", "xpu": "xccl"}.get(KIND)
COUNT = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
PROMPT = 10.0  # seconds
MSE = nn.functional.mse_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CARRIER is None or COUNT < 2, reason="needs an accelerator for each of two ranks"),
]
simulated = pytest.mark.skipif(not SIMULATED, reason="needs what simulated accelerators alone can do")


def world_of(ranks):
    if ranks > COUNT:
        pytest.skip(f"needs {ranks} accelerators, and this machine has {COUNT}")
    return World(ranks, f"cpu:gloo,{KIND}:{CARRIER}")


@pytest.fixture(scope="module")
def two():
    world = world_of(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def three():
    world = world_of(3)
    yield world
    world.close()


@pytest.fixture(scope="module")
def four():
    world = world_of(4)
    yield world
    world.close()


def exact(function):
    """A function of a rank, with deterministic kernels."""

    @functools.wraps(function)
    def deterministic(rank, *args):
        torch.use_deterministic_algorithms(True)
        return function(rank, *args)

    return deterministic


def device(rank):
    return torch.device(torch.accelerator.current_accelerator().type, rank)


def straight(pipe):
    """How many routes of this rank join accelerators."""
    return len(pipe._calls.wires.straight)


# --- the same bits ----------------------------------------------------------------------------------------------------


def layers(place=None):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True) for _ in range(4)))


@skippable(stash=["long", "short"])
class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        yield stash("long", x * 2)
        yield stash("short", x[:, :3])
        return self.linear(x)


@skippable(pop=["short"])
class Middle(nn.Module):
    def forward(self, x):
        short = yield pop("short")
        return torch.cat([x[:, :3] + short, x[:, 3:]], 1)


@skippable(pop=["long"])
class Join(nn.Module):
    def forward(self, x):
        long = yield pop("long")
        return x * long


def skips(place=None):
    torch.manual_seed(0)
    drawing = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 16))
    return nn.Sequential(Fork(), nn.Linear(16, 16), drawing, Middle(), Join(), nn.Linear(16, 16))


def tied(place):
    torch.manual_seed(0)
    cells = [nn.Linear(16, 16).to(place) for _ in range(4)]
    cells[3].weight = cells[0].weight
    return nn.Sequential(*cells)


def trees(place=None):
    """Boundaries of several tensors: views of one memory, an integer on the accelerator, one on the CPU, a word."""
    torch.manual_seed(0)

    def fork(x, linear):
        y = linear(x)
        return {"q": y[..., :8], "k": y[..., 8:], "n": torch.arange(3, device=x.device), "c": torch.ones(2), "w": "two"}

    def join(t, linear):
        return linear(torch.cat([t["k"], t["q"]], -1) * t["n"].sum().to(t["q"].dtype) + t["c"].sum().item())

    return nn.Sequential(Apply(fork, nn.Linear(16, 16)), Apply(join, nn.Linear(16, 16)), *layers()[:2])


NETS = {net.__name__: net for net in (layers, skips, tied, trees)}
SIZES = [(11, 5), (11, 5), (11, 7), (3, 7), (11, 5)]  # rows and lengths: the last micro-batch is smaller, shapes change


def steps(pipe, train_step):
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-3)
    losses = []
    for rows, length in SIZES:
        optimizer.zero_grad()
        x = torch.randn(rows, length, 16, generator=torch.Generator().manual_seed(rows))
        losses.append(train_step(x, x).cpu())
        optimizer.step()
    return {name: value.cpu() for name, value in pipe.state_dict().items()}, losses


@exact
def train(rank, net, balance, options):
    pipe = gpipe.DistributedGPipe(
        NETS[net](device(rank)), balance, chunks=4, seed=3, loss_fn=MSE, device=device(rank), **options
    )
    state, losses = steps(pipe, pipe.train_step)
    pipe.eval()
    pipe(torch.ones(5, 5, 16))
    return state, losses, straight(pipe)


def as_on_threads(world, net, balance, straight, hosts=None, **options):
    torch.use_deterministic_algorithms(True)
    try:
        hosts = hosts or range(len(balance))
        pipe = gpipe.GPipe(NETS[net](device(0)), balance, devices=[device(h) for h in hosts], chunks=4, seed=3)
        expected, losses = steps(pipe, lambda x, y: pipe.train_step(x, y, MSE, **options))
    finally:
        torch.use_deterministic_algorithms(False)
    found = world.values(train, net, balance, options, seconds=120)
    assert_same({name: value for state, *_ in found for name, value in state.items()}, expected)
    for _, told, _ in found:
        assert_same(told, losses)
    assert [count for *_, count in found] == straight


MICRO = {"loss_over": "micro_batch"}


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("gpipe", {}),
        ("gpipe", MICRO),
        ("one_f_one_b", MICRO),
        ("zero_bubble_h1", MICRO),
        ("gpipe_zero_bubble", {}),
        ("one_f_one_b", {"two_pass": True, "loss_over": "mini_batch"}),
    ],
    ids=str,
)
def test_the_bits_of_threads(two, schedule, options):
    as_on_threads(two, "layers", [2, 2], [2, 2], schedule=schedule, **options)


def test_the_bits_of_threads_with_several_stages_a_rank(two):
    as_on_threads(two, "layers", [1] * 4, [6, 6], [0, 1, 0, 1], schedule="interleaved_one_f_one_b", **MICRO)


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "zero_bubble_h1"])
def test_the_bits_of_threads_with_values_that_skip_stages(three, schedule):
    as_on_threads(three, "skips", [2, 1, 3], [4, 4, 4], schedule=schedule, **MICRO)


@pytest.mark.parametrize("net", ["tied", "trees"])
def test_the_bits_of_threads_with_ties_and_boundaries_of_many_tensors(two, net):
    as_on_threads(two, net, [1, 3], [2, 2], [0, 0], schedule="one_f_one_b", **MICRO)


# --- replicas ---------------------------------------------------------------------------------------------------------


def mesh_of(replicas, stages):
    return init_device_mesh("cpu", (replicas, stages), mesh_dim_names=("dp", "pp"))


def sometimes():
    torch.manual_seed(0)
    return nn.Sequential(Sometimes(), nn.Linear(2, 2), nn.Dropout(0.2), nn.Linear(2, 2))


@exact
def train_replica(rank):
    pipe = gpipe.DistributedGPipe(
        sometimes(), [2, 2], chunks=3, seed=3, loss_fn=MSE, mesh=mesh_of(2, 2), device=device(rank), **MICRO
    )
    x = torch.full((6, 2), 1.0 if rank < 2 else -1.0)
    losses = [pipe.train_step(x, x).cpu() for _ in range(2)]
    norm = pipe.clip_grad_norm_(0.1)
    named = {name: None if p.grad is None else p.grad.cpu() for name, p in pipe.named_parameters()}
    return named, {name: b.cpu() for name, b in pipe.named_buffers()}, losses, norm.cpu(), straight(pipe)


def test_replicas_take_means_and_have_the_first_ones_buffers(four):
    found = four.values(train_replica, seconds=120)
    module = sometimes()
    pipe = gpipe.GPipe(module, [2, 2], devices=[device(0), device(1)], chunks=6, seed=3)
    x = torch.cat([torch.full((6, 2), 1.0), torch.full((6, 2), -1.0)])
    for told in zip(*(losses for *_, losses, _, _ in found), strict=True):
        expected = pipe.train_step(x, x, MSE, "micro_batch").cpu()
        for loss in told:
            torch.testing.assert_close(loss, expected)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.1).cpu()
    first, second = found[0][0] | found[1][0], found[2][0] | found[3][0]
    assert_same(second, first)
    assert first["0.never"] is None
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(first[name], p.grad.cpu())
    for _, buffers, _, told, routes in found:
        torch.testing.assert_close(told, norm)
        assert routes == 2
        assert all(seen == 24.0 for seen in buffers.values())  # the first replica's


# --- the hosts run ahead ----------------------------------------------------------------------------------------------


class Spend(nn.Module):
    """A cell whose forward, and whose backward, takes so long on the device."""

    def __init__(self, seconds):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.seconds = seconds

    def forward(self, x):
        return Spent.apply(self.linear(x), self.seconds)


class Spent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        return accelerators.spend(x, seconds)

    @staticmethod
    def backward(ctx, gradient):
        return accelerators.spend(gradient, ctx.seconds), None


def spending(rank, stages, seconds, chunks, schedule):
    torch.manual_seed(0)
    module = nn.Sequential(*(Spend(seconds) for _ in range(stages)))
    options = {"schedule": schedule, "checkpoint": "never", "device": device(rank), **MICRO}
    return gpipe.DistributedGPipe(module, [1] * stages, chunks=chunks, seed=3, loss_fn=MSE, **options)


def waits_in_a_step(rank, schedule):
    pipe = spending(rank, 2, 0.0, 4, schedule)
    x = torch.ones(8, 8, device=device(rank))
    for _ in range(2):
        pipe.train_step(x, x)
    accelerators.clear()
    pipe.train_step(x, x)
    step = accelerators.waits()
    accelerators.clear()
    pipe.clip_grad_norm_(1.0)
    return step, accelerators.waits()


@simulated
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
def test_a_host_waits_for_its_device_where_the_loss_is_read_alone(two, schedule):
    (first, clip), (last, last_clip) = two.values(waits_in_a_step, schedule, seconds=60)
    assert sum(first.values()) == 0, first
    assert sum(last.values()) == 1, last
    assert sum(clip.values()) == sum(last_clip.values()) == 1


def waits_of_a_replica(rank):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    pipe = gpipe.DistributedGPipe(
        module, [4], chunks=2, seed=3, loss_fn=MSE, mesh=mesh_of(2, 1), device=device(rank), **MICRO
    )
    x = torch.rand(8, 8, device=device(rank))
    for _ in range(2):
        pipe.train_step(x, x)
    accelerators.clear()
    pipe.train_step(x, x)
    return accelerators.waits()


@simulated
def test_hosts_of_replicas_do_not_wait_for_means_and_buffers(two):
    for waits in two.values(waits_of_a_replica, seconds=60):
        assert sum(waits.values()) == 1, waits  # for the loss


def time_a_step(rank, stages, schedule, chunks, latency):
    pipe = spending(rank, stages, 0.03, chunks, schedule)
    accelerators.set_link(0.0, latency)
    x = torch.ones(2 * chunks, 8, device=device(rank))
    for _ in range(2):
        pipe.train_step(x, x)
    taken = []
    for _ in range(3):
        torch.accelerator.synchronize()
        dist.barrier()
        start = time.monotonic()
        pipe.train_step(x, x)
        torch.accelerator.synchronize()
        taken.append(time.monotonic() - start)
    accelerators.set_link(0.0, 0.0)
    return min(taken)


@simulated
@pytest.mark.parametrize("latency", [0.0, 0.015])
@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b"])
def test_a_step_takes_as_long_as_simulated(three, schedule, latency):
    chunks = 6
    found = max(three.values(time_a_step, 3, schedule, chunks, latency, seconds=60))
    cost = gpipe.StageCost(0.03, 0.03, 0.0)
    expected = gpipe.simulate(gpipe.schedules.BUILDERS[schedule](3, chunks), cost, (latency, 1e12)).makespan
    assert found < 1.25 * expected


# --- failures ---------------------------------------------------------------------------------------------------------


def fail(rank, at, schedule):
    module = layers()
    bomb = module[at] = Bomb()
    bomb.linear = nn.Identity()
    pipe = gpipe.DistributedGPipe(
        module, [1, 1, 2], chunks=4, seed=3, loss_fn=MSE, device=device(rank), schedule=schedule, **MICRO
    )
    x = torch.ones(8, 5, 16)
    pipe.train_step(x, x)
    bomb.arm(ValueError("boom"), "forward", calls=2)
    pipe.train_step(x, x)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_a_cell_raises_ends_the_step_on_every_rank(three, at):
    found = three.run(fail, at, "one_f_one_b", seconds=60)
    for rank, raised in enumerate(found):
        assert isinstance(raised, Raised)
        assert raised.type == ("ValueError" if rank == at else "OtherRankFailed"), raised.text
        assert "boom" in raised.message


def abandoned(rank):
    """Rank 1 waits on its device for what rank 0 never sends, on a route, and in a group that was taken in."""
    gloo, own, other = dist.new_group(backend="gloo"), *(dist.new_group([0, 1], backend=CARRIER) for _ in range(2))
    route = Route(0, 1, 0, gloo, device(rank), Direct(own, 0, 1))
    route.direct.greet(rank, device(rank))
    Direct(other, 0, 1).greet(rank, device(rank))
    wires = Wires(rank, {(0, 1, Direction.FORWARD): route})
    wires.take_in(other, True, lambda: False)
    start = time.monotonic()
    if rank == 1:
        buffers = [torch.empty(5, dtype=torch.uint8, device=device(rank)) for _ in range(2)]
        works = [*route.direct.receive([buffers[0]]), *Direct(other, 0, 1).receive([buffers[1]])]
        wires.give_up()
        for work in works:
            with suppress(RuntimeError):  # aborted
                work.wait()
        torch.accelerator.synchronize()
    seconds = time.monotonic() - start
    dist.barrier(group=gloo)
    wires.give_up()
    wires.close()
    return seconds


def test_a_device_that_waits_for_a_rank_in_vain_is_released(two):
    assert all(seconds < PROMPT for seconds in two.values(abandoned, seconds=30))


class Deadly(nn.Module):
    """A cell that kills its process."""

    armed = False

    def forward(self, x):
        if self.armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def die(rank, victim):
    module = sometimes()
    module.append(Deadly())
    pipe = gpipe.DistributedGPipe(
        module, [2, 3], chunks=3, seed=3, loss_fn=MSE, mesh=mesh_of(2, 2), device=device(rank), **MICRO
    )
    x = torch.full((6, 2), 1.0)
    pipe.train_step(x, x)
    module[-1].armed = rank == victim
    start = time.monotonic()
    try:
        pipe.train_step(x, x)
    except OtherRankFailed:
        torch.accelerator.synchronize()
        return time.monotonic() - start
    return None


def test_a_replica_that_is_killed_ends_the_others_at_once():
    world = world_of(4)
    try:
        world.start(die, 3)
        for seconds in world.results([0, 1, 2], seconds=60):
            assert isinstance(seconds, float), seconds and seconds.text
            assert seconds < PROMPT
    finally:
        world.kill()


def run_out(rank, straight):
    place = device(rank if straight else 0)
    cells = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    pipe = gpipe.DistributedGPipe(cells, [1, 1], chunks=2, seed=3, loss_fn=MSE, device=place, **MICRO)
    pipe.train_step(torch.ones(4, 256), torch.ones(4, 256))
    x = torch.ones(4, 256)
    if rank == 1:
        accelerators.set_capacity(place.index, torch.accelerator.memory_allocated(place.index) + 2**17)
    try:
        x = torch.ones(4096, 256)
        pipe.train_step(x, x[:, :0].sum(1) if rank else x)
    finally:
        accelerators.set_capacity(place.index, 2**34)


@simulated
@pytest.mark.parametrize("straight", [True, False])
def test_a_rank_whose_device_is_full_fails_itself(two, straight):
    lost, full = two.run(run_out, straight, seconds=60)
    assert full.type == "OutOfMemoryError", full.text
    assert lost.type == "OtherRankFailed", lost.text
    assert "rank 1 failed in step 1 with OutOfMemoryError" in lost.message


def joins_over_a_link_that_loses(rank):
    sent = lanes.pattern
    if rank == 1:
        lanes.pattern = lambda: sent() + 1
    try:
        gpipe.DistributedGPipe(layers(), [2, 2], chunks=2, loss_fn=MSE, device=device(rank))
    finally:
        lanes.pattern = sent


def test_ranks_whose_devices_lose_what_they_send_are_refused_on_both(two):
    results = two.run(joins_over_a_link_that_loses)
    assert [result.type for result in results] == ["RuntimeError", "RuntimeError"]
    assert "what the accelerator of rank 0 sends to that of rank 1 does not arrive" in results[1].message
    assert "what the accelerator of rank 1 sends to that of rank 0 does not arrive" in results[0].message


def takes_a_number_for_a_scaler(rank):
    pipe = gpipe.DistributedGPipe(layers(), [2, 2], chunks=2, loss_fn=MSE, loss_over="micro_batch", device=device(rank))
    x = torch.randn(4, 3, 16)
    with pytest.raises(TypeError, match=r"scaler must be a torch\.amp\.GradScaler, or None, got float"):
        pipe.train_step(x, x, scaler=1024.0)
    return pipe.train_step(x, x).item()


def test_what_is_no_scaler_is_refused_and_the_pipe_goes_on(two):
    first, second = two.values(takes_a_number_for_a_scaler)
    assert first == second
