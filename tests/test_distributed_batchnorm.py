"""``DistributedGPipe(deferred_batch_norm=True)``: every rank commits what its layers saw, to the bits of ``GPipe``."""

import pytest
import torch
from nets import assert_same, gradients, make_pipe
from test_distributed import joined, mean_square, wrapped
from torch import nn
from worlds import World

OPTIONS = [
    {"checkpoint": "always"},
    {"checkpoint": "never", "loss_over": "micro_batch", "schedule": "one_f_one_b"},
    {"checkpoint": "except_last", "two_pass": True},
]


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


def normed():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)
    )


X, Y = torch.linspace(-2, 3, 44).reshape(11, 4).sin(), torch.ones(11, 4)


def train(rank, options, deferred):
    pipe = wrapped(normed(), [2, 3], 4, mean_square, deferred_batch_norm=deferred, **options)
    pipe.train_step(X, Y)
    pipe(2 * X)
    pipe.train_step(3 * X, Y)
    trained = {k: v.clone() for k, v in pipe.state_dict().items()}
    pipe.eval()
    output = pipe(X)
    assert_same(dict(pipe.state_dict()), trained)
    return gradients(pipe), trained, output


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("deferred", [True, False])
def test_running_statistics_are_those_of_threads_to_the_last_bit(two, options, deferred):
    module = normed()
    pipe = make_pipe(module, [2, 3], 4, options["checkpoint"], deferred_batch_norm=deferred)
    step = {k: v for k, v in options.items() if k != "checkpoint"}
    pipe.train_step(X, Y, mean_square, **step)
    with torch.no_grad():
        pipe(2 * X)
    pipe.train_step(3 * X, Y, mean_square, **step)
    (first, begin, _), (last, end, output) = two.values(train, options, deferred)
    assert_same(joined([begin, end]), module.state_dict())
    assert_same(joined([first, last]), gradients(module))
    assert module[1].num_batches_tracked == (3 if deferred else 12)
    pipe.eval()
    assert torch.equal(output, pipe(X))


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("boom")


def fail(rank):
    pipe = wrapped(nn.Sequential(nn.BatchNorm1d(4), Fails()), [1, 1], 2, mean_square, deferred_batch_norm=True)
    with pytest.raises((ValueError, RuntimeError), match="boom"):
        pipe.train_step(X, Y)
    return dict(pipe.state_dict())


def test_a_step_that_fails_on_another_rank_commits_nothing(two):
    first, _ = two.values(fail)
    assert first["0.num_batches_tracked"] == 0
    assert not first["0.running_mean"].any()


def differ(rank):
    wrapped(normed(), [2, 3], 4, mean_square, deferred_batch_norm=rank == 1)


def test_ranks_must_agree(two):
    for raised in two.run(differ):
        assert "they differ in deferred_batch_norm: rank 0 has False, rank 1 has True" in raised.message
