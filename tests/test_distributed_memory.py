"""``record(pipe, memory=True)`` on ranks: the bytes of their own stages, which are those of ``GPipe``'s stages."""

import time

import pytest
import torch
from nets import make_pipe
from test_distributed import mean_square, wrapped
from torch import nn
from worlds import World

from gpipe import record

CASES = [
    {"checkpoint": "always"},
    {"checkpoint": "never"},
    {"checkpoint": "except_last", "loss_over": "micro_batch", "schedule": "one_f_one_b"},
    {"checkpoint": "always", "two_pass": True},
    {"checkpoint": "never", "two_pass": True},
]


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


def measured():
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(5)))


X = torch.linspace(-2, 3, 64 * 64).reshape(64, 64).sin()


ROW = 64 * 4  # bytes that pass a boundary for a row


def train(rank, chunks, options):
    pipe = wrapped(measured(), [2, 3], chunks, mean_square, **options)
    with record(pipe, memory=True) as timeline:
        pipe.train_step(X, X)
    pipe.train_step(X, X)
    assert pipe.timeline.peak_bytes == ()
    (worker,) = timeline.worker_memory
    assert worker.peak == timeline.peak_bytes[rank]
    return timeline.peak_bytes, int(timeline.memory[rank].bytes[0]), len(timeline.memory[1 - rank])


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("chunks", [1, 8])
def test_ranks_count_what_threads_do(two, options, chunks):
    pipe = make_pipe(measured(), [2, 3], chunks, options["checkpoint"])
    step = {k: v for k, v in options.items() if k != "checkpoint"}
    with record(pipe, memory=True) as timeline:
        pipe.train_step(X, X, mean_square, **step)
    (first, begin, nothing), (last, end, neither) = two.values(train, chunks, options)
    assert (begin, end) == tuple(stage.bytes[0] for stage in timeline.memory)
    assert (first[1], last[0], nothing, neither) == (0, 0, 0, 0)
    found = first[0], last[1]
    assert found == pytest.approx(timeline.peak_bytes, rel=0, abs=others(chunks))


def others(chunks):
    """Bytes of the messages that may wait beside one; how many do depends on who is faster."""
    return ROW * 64 * (chunks - 1) / chunks


def evaluate(rank, chunks):
    pipe = wrapped(measured(), [2, 3], chunks, mean_square)
    with record(pipe, memory=True) as timeline:
        pipe.eval_step(X)
    return timeline.peak_bytes


@pytest.mark.parametrize("chunks", [1, 8])
def test_an_evaluation_is_counted(two, chunks):
    pipe = make_pipe(measured(), [2, 3], chunks)
    with record(pipe, memory=True) as timeline, torch.no_grad():
        pipe(X)
    first, last = two.values(evaluate, chunks)
    assert (first[0], last[1]) == pytest.approx(timeline.peak_bytes, rel=0, abs=others(chunks))


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.005)
        return x[:, :4] * 2


def fall_behind(rank):
    torch.manual_seed(3)
    pipe = wrapped(nn.Sequential(nn.Linear(4, 4096), Slow()), [1, 1], 16, mean_square, two_pass=True)
    with record(pipe, memory=True) as timeline:
        pipe.train_step(X[:16, :4], X[:16, :4])
    return timeline.peak_bytes


def test_boundaries_of_two_passes_do_not_queue_up(two):
    _, last = two.values(fall_behind)
    assert last[1] < 7 * 4096 * 4  # two wait, one arrives, one is computed and one copied, one is a gradient; not 16
