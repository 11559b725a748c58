"""Routes between ranks: whatever layouts follow each other, what arrives is what was sent, and nothing stays behind."""

import gc
import threading
import time
from contextlib import ExitStack, suppress
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import assert_same, gradients, make_pipe
from test_distributed import joined, wrapped
from test_failures import Bomb
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from worlds import Raised, World

from gpipe.ranks.direct import Direct, accelerator, direct
from gpipe.ranks.group_transport import GroupTransport, Wires
from gpipe.ranks.message_order import Passing
from gpipe.ranks.routes import Route
from gpipe.ranks.slot import ROOM
from gpipe.transport import Aborted, Direction

KEYS = [(0, 1, Direction.FORWARD), (2, 3, Direction.FORWARD)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


class Polled:
    """A work of gloo's that is complete at some time, as NCCL's, not only when somebody has waited."""

    def __init__(self, work):
        self._ended = threading.Event()
        threading.Thread(target=self._watch, args=(work,), daemon=True).start()

    def _watch(self, work):
        with suppress(RuntimeError):  # the other rank failed
            work.wait()
        self._ended.set()

    def wait(self):
        self._ended.wait()

    def is_completed(self):
        return self._ended.is_set()


class OverGloo(Direct):
    def send(self, tensors):
        return list(map(Polled, super().send(tensors)))

    def receive(self, tensors):
        return list(map(Polled, super().receive(tensors)))


def wired(rank, straight=False):
    """Two routes from rank 0 to rank 1; straight: with gloo in the place of NCCL."""
    group = dist.new_group(backend="gloo")
    routes = {}
    for tag, key in enumerate(KEYS):
        carrier = OverGloo(dist.new_group([0, 1], backend="gloo"), 0, 1) if straight else None
        routes[key] = Route(0, 1, tag, group, CPU, carrier)
    return Wires(rank, routes)


def messages():
    torch.manual_seed(0)
    large, other = torch.randn(5000), torch.randn(2500).double()
    word = "x" * (2 * ROOM)
    return [
        [large],
        [large + 1],
        [large, large * 2],
        [large + 2, large * 3],
        [large[:7]],  # in the slot
        [large[:7] + 1],
        [large],
        [other],  # as many bytes of another type
        [word, None],  # a header that is larger than a slot
        [word, None],
        [word, large],
        [word, large + 1],
        [None],
        [torch.randn(70000)[::3]],
        [torch.randn(70000)[::3]],
        [torch.randn(100, 100).t(), large[:5], word],
        [large[: ROOM // 4]],
        [],
        [large],
    ]


def pass_messages(rank, straight):
    wires = wired(rank, straight)
    found = []
    for step in (messages(), messages()[::-1], messages()):
        transport = GroupTransport(wires)
        order = [Passing(*key, m) for m in range(len(step)) for key in (KEYS if m % 2 else KEYS[::-1])]
        transport.follow(lambda order=order: order)
        if rank == 0:
            for *key, m in order:
                transport.send(*key, m, step[m])
        else:
            for key in KEYS:
                transport.open(key, len(step))
            found += [[transport.receive(*key, m) for m in range(len(step))[::-1]][::-1] for key in KEYS]
        transport.flush()
    wires.close()
    return found


@pytest.mark.parametrize("straight", [False, True])
def test_layouts_that_change(two, straight):
    _, found = two.values(pass_messages, straight)
    expected = [messages(), messages(), messages()[::-1], messages()[::-1], messages(), messages()]
    assert len(found) == len(expected)
    for step, sent in zip(found, expected, strict=True):
        for message, values in zip(step, sent, strict=True):
            assert len(message) == len(values)
            for here, there in zip(message, values, strict=True):
                if isinstance(there, torch.Tensor):
                    assert torch.equal(here, there)
                    assert here.stride() == there.stride()
                else:
                    assert here == there


def until(true):
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count_receives(rank):
    wires = wired(rank)
    large = [torch.ones(5000), torch.zeros(3000)]
    for expected in (1, 3):  # the slot; the slot and both tensors
        transport = GroupTransport(wires)
        with mock.patch.object(Route, "receive", autospec=True, side_effect=Route.receive) as receive:
            if rank == 1:
                transport.open(KEYS[0], 1)
                until(lambda receive=receive, expected=expected: receive.call_count == expected)
            dist.barrier()  # only now is anything sent
            if rank == 0:
                transport.send(*KEYS[0], 0, large)
                transport.flush()
            else:
                found = transport.receive(*KEYS[0], 0)
                assert all(map(torch.equal, found, large))
                assert receive.call_count == 3  # none but those that were needed
    wires.close()


def test_tensors_as_before_are_awaited_together_with_the_slot(two):
    two.values(count_receives)


def stop_midway(rank, straight):
    wires = wired(rank, straight)
    transport = GroupTransport(wires)
    transport.follow(lambda: [Passing(*KEYS[0], m) for m in range(3)])
    gone = threading.Event()
    if rank == 0:
        transport.send(*KEYS[0], 0, [torch.ones(5000)])
        wires.give_up()
        wires.outgoing[KEYS[0]].after(gone.set)
        with pytest.raises(Aborted):
            wires.outgoing[KEYS[0]].send(1, [torch.ones(5000)])
    else:
        transport.open(KEYS[0], 3)
        assert torch.equal(transport.receive(*KEYS[0], 0)[0], torch.ones(5000))
        wires.give_up()
        wires.incoming[KEYS[0]]._jobs.put(gone.set)
    stopped = gone.wait(10)
    wires.close()
    return stopped


@pytest.mark.parametrize("straight", [False, True])
def test_a_stop_leaves_nothing_that_waits(two, straight):
    assert two.values(stop_midway, straight) == [True, True]


def gloo_instead(new_group):
    return lambda ranks=None, backend=None: new_group(ranks, backend="gloo")


def choose(rank):
    with mock.patch("gpipe.ranks.direct.dist.new_group", side_effect=gloo_instead(dist.new_group)) as made:
        same = direct(0, 1, ["nccl h GPU-1", "nccl h GPU-1"], rank, CPU)
        cpu = direct(0, 1, ["nccl h GPU-1", ""], rank, CPU)
        other = direct(0, 1, ["nccl h GPU-1", "xccl h XPU-1"], rank, CPU)
        assert not made.called
        own = direct(1, 0, ["nccl h GPU-1", "nccl h GPU-2"], rank, CPU)
    (call,) = made.call_args_list
    assert call.args == ([1, 0],)
    return same, cpu, other, (own.source, own.target), call.kwargs, accelerator(CPU)


def test_nccl_carries_what_passes_between_two_accelerators(two):
    for found in two.values(choose):
        assert found == (None, None, None, (1, 0), {"backend": "nccl"}, "")


def straight_pipe(rank, module, balance, **options):
    """A pipe with gloo in the place of NCCL, as if every rank had an accelerator."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("gpipe.ranks.joining.accelerator", return_value=f"nccl host GPU-{rank}"))
        stack.enter_context(mock.patch("gpipe.ranks.direct.Direct", OverGloo))
        stack.enter_context(mock.patch("gpipe.ranks.direct.dist.new_group", side_effect=gloo_instead(dist.new_group)))
        pipe = wrapped(module, balance, 4, F.mse_loss, loss_over="micro_batch", **options)
    ends = [*pipe._calls.wires.outgoing.values(), *pipe._calls.wires.incoming.values()]
    assert sum(end.route.direct is not None for end in ends) == 2 * (len(balance) - 1)
    return pipe


def wide():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 300), nn.Dropout(0.2), nn.Linear(300, 8))


def train_straight(rank, balance, schedule):
    pipe = straight_pipe(rank, wide(), balance, schedule=schedule)
    for rows in (32, 32, 30, 3):
        pipe.train_step(torch.ones(rows, 8), torch.zeros(rows, 8))
    return gradients(pipe)


@pytest.mark.parametrize(("balance", "schedule"), [([3, 2], "gpipe"), ([1, 1, 2, 1], "interleaved_one_f_one_b")])
def test_a_pipe_whose_tensors_go_straight_has_the_same_bits(two, balance, schedule):
    module = wide()
    pipe = make_pipe(module, balance, 4)
    for rows in (32, 32, 30, 3):
        pipe.train_step(torch.ones(rows, 8), torch.zeros(rows, 8), F.mse_loss, "micro_batch", schedule=schedule)
    assert_same(joined(two.values(train_straight, balance, schedule)), gradients(module))


def fail_straight(rank, at):
    module = wide()
    bomb = module[at] = Bomb()
    bomb.linear = nn.Identity()
    pipe = straight_pipe(rank, module, [3, 2])
    pipe.train_step(torch.ones(32, 8), torch.zeros(32, 8))
    bomb.arm(ValueError("boom"), "forward", calls=2)
    pipe.train_step(torch.ones(32, 8), torch.zeros(32, 8))


@pytest.mark.parametrize("at", [1, 3])
def test_a_failure_ends_a_pipe_whose_tensors_go_straight(two, at):
    found = two.run(fail_straight, at)
    assert all(isinstance(raised, Raised) and "boom" in raised.message for raised in found)


def groups(rank, replicas):
    gc.collect()  # pipes of other tests
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "pp")) if replicas else None
    before = len(dist.distributed_c10d._world.pg_map)
    if replicas:
        pipe = wrapped(wide(), [5], 4, F.mse_loss, mesh=mesh)
    else:
        pipe = straight_pipe(rank, wide(), [3, 2])
    pipe.train_step(torch.ones(32, 8), torch.zeros(32, 8))
    during = len(dist.distributed_c10d._world.pg_map)
    del pipe
    gc.collect()
    return during - before, len(dist.distributed_c10d._world.pg_map) - before


@pytest.mark.parametrize(("replicas", "number"), [(False, 4), (True, 3)])
def test_a_pipe_that_is_gone_has_no_groups(two, replicas, number):
    """Two of gloo's, and one for every route between accelerators, or one of replicas."""
    assert two.values(groups, replicas) == [(number, 0), (number, 0)]
