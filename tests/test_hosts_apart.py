"""Ranks on two hosts, 20 ms and 100 Mbit/s apart: the same bits. (How long steps take is a benchmark's business.)"""

import os
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, gradients, make_pipe
from test_distributed import SPLITS, joined, on_threads, run, wrapped
from torch import nn
from worlds import World

from benchmarks.namespaces import Unavailable, two_hosts


@pytest.fixture(scope="module")
def apart():
    with ExitStack() as stack:
        try:
            network = stack.enter_context(two_hosts(delay=0.02, bandwidth=12.5e6))
        except Unavailable as error:
            pytest.skip(f"needs network namespaces, with a link between them: {error}")
        world = World(2, hosts=network.hosts)
        stack.callback(world.close)
        yield world


def namespace(rank):
    return os.readlink("/proc/thread-self/ns/net")


def test_each_rank_has_a_network_of_its_own(apart):
    found = {*apart.values(namespace), os.readlink("/proc/thread-self/ns/net")}
    assert len(found) == 3


@pytest.mark.parametrize(("loss_over", "schedule"), [("mini_batch", "gpipe"), ("micro_batch", "one_f_one_b")])
def test_the_weights_are_those_of_threads_to_the_last_bit(apart, loss_over, schedule):
    options = {"loss_over": loss_over, "schedule": schedule, "checkpoint": "except_last"}
    found = apart.values(run, SPLITS[2], 11, options, seconds=60)
    state, losses = on_threads(2, 11, loss_over, schedule, "except_last")
    assert_same(joined([s for s, _ in found]), state)
    assert [told for _, told in found] == [losses, losses]


def wide():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(16, 1000), nn.ReLU(), nn.Linear(1000, 16))


def send_much(rank):
    """A boundary of 32 kB a row."""
    pipe = wrapped(wide(), [2, 1], 4, F.mse_loss, loss_over="micro_batch", schedule="one_f_one_b")
    for rows in (64, 64, 30):
        pipe.train_step(torch.ones(rows, 16), torch.zeros(rows, 16))
    return gradients(pipe)


def test_messages_larger_than_what_is_under_way(apart):
    module = wide()
    pipe = make_pipe(module, [2, 1], 4)
    for rows in (64, 64, 30):
        pipe.train_step(torch.ones(rows, 16), torch.zeros(rows, 16), F.mse_loss, "micro_batch", schedule="one_f_one_b")
    assert_same(joined(apart.values(send_much, seconds=60)), gradients(module))
