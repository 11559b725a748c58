"""Parameters that cells on several ranks use: one gradient, copies equal to the bit."""

import functools

import pytest
import torch
import torch.distributed as dist
from nets import assert_same, gradients, make_pipe
from test_tied import language_model, loss_fn, tokens
from torch import nn
from worlds import Raised, World

from gpipe.distributed import DistributedGPipe
from gpipe.ranks.slicing import initialised


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="module")
def four():
    world = World(4)
    yield world
    world.close()


def trained(step, parameters):
    optimizer = torch.optim.AdamW(parameters, 0.01)
    losses = []
    for n in (7, 7, 3):
        optimizer.zero_grad()
        losses.append(step(tokens()[:n], tokens()[:n]))
        optimizer.step()
    return losses


def train(rank, balance, factory, options):
    pipe = DistributedGPipe(
        language_model if factory else language_model(), balance, chunks=4, loss_fn=loss_fn, seed=7, **options
    )
    losses = trained(pipe.train_step, pipe.parameters())
    return dict(pipe.state_dict()), losses, [name for name, _ in pipe.named_parameters()]


@functools.cache
def on_threads(stages, factory, schedule, loss_over):
    module = initialised(language_model, 7) if factory else language_model()
    pipe = make_pipe(module, [4 // stages] * stages, 4)
    step = functools.partial(pipe.train_step, loss_fn=loss_fn, loss_over=loss_over, schedule=schedule)
    return module, trained(step, pipe.parameters())


@pytest.mark.parametrize("factory", [False, True])
@pytest.mark.parametrize(
    ("schedule", "loss_over"), [("gpipe", "mini_batch"), ("one_f_one_b", "micro_batch"), ("gpipe", "micro_batch")]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_weights_are_those_of_threads(request, ranks, schedule, loss_over, factory):
    world = request.getfixturevalue("two" if ranks == 2 else "four")
    found = world.values(train, [4 // ranks] * ranks, factory, {"schedule": schedule, "loss_over": loss_over})
    module, losses = on_threads(ranks, factory, schedule, loss_over)
    whole = {}
    for state, told, _ in found:
        assert_same(told, losses)
        for key, value in state.items():
            assert torch.equal(whole.setdefault(key, value), value)
    assert_same(whole, module.state_dict())
    assert {name for _, _, names in found for name in names} == {name for name, _ in module.named_parameters()}
    assert "0.weight" in found[0][2]
    assert "0.weight" in found[-1][2]  # the name the whole module has first


def in_four_cells():
    """Cells 0 to 3 go to ranks 0, 1, 0, 1: the sum of their gradients is no sum of the ranks' sums."""
    torch.manual_seed(3)
    cells = [nn.Linear(5, 5) for _ in range(4)]
    for cell in cells[1:]:
        cell.weight = cells[0].weight
    return nn.Sequential(*cells)


def squared(y, t):
    return (y - t).square().mean()


def batch():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def interleave(rank, frozen):
    module = in_four_cells()
    module[0].weight.requires_grad_(not frozen)
    options = {"loss_over": "micro_batch", "schedule": "interleaved_one_f_one_b"}
    pipe = DistributedGPipe(module, [1, 1, 1, 1], chunks=4, loss_fn=squared, **options)
    seen = []
    if not frozen:
        next(pipe.parameters()).register_hook(lambda gradient: seen.append(gradient.clone()))
    pipe.train_step(batch(), -batch())
    pipe.train_step(batch(), -batch())
    return gradients(pipe), seen


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_added_cell_after_cell(two, frozen):
    module = in_four_cells()
    module[0].weight.requires_grad_(not frozen)
    pipe = make_pipe(module, [1, 1, 1, 1], 4)
    for _ in range(2):
        pipe.train_step(batch(), -batch(), squared, "micro_batch", schedule="one_f_one_b")
    found = two.values(interleave, frozen)
    for own, seen in found:
        assert_same(own, {name: gradients(module)[name] for name in own})
        assert len(seen) == (0 if frozen else 2)  # a hook runs once a step, on the whole gradient
    assert set(found[0][0]) | set(found[1][0]) == set(gradients(module))


def with_other_values(rank):
    module = language_model()
    with torch.no_grad():
        module[0].weight.add_(rank)
    pipe = DistributedGPipe(module, [2, 2], chunks=2, loss_fn=loss_fn)
    return dict(pipe.named_parameters())["0.weight"].detach()


def test_copies_begin_with_the_first_ranks_values(two):
    for weight in two.values(with_other_values):
        assert torch.equal(weight, language_model()[0].weight)


def in_the_loss(rank):
    module = language_model()
    return DistributedGPipe(module, [2, 2], chunks=2, loss_fn=Borrowing(module[0]))


class Borrowing(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.table = embedding.weight

    def forward(self, y, t):
        return (y @ self.table.T).mean()


def test_a_loss_may_not_use_another_ranks_parameter(two):
    for raised in two.run(in_the_loss):
        assert isinstance(raised, Raised)
        assert "loss_fn uses '0.weight' of stage 0 as 'table', but is computed on the last stage" in raised.message


def clip(rank, max_norm, norm_type):
    pipe = DistributedGPipe(language_model(), [2, 2], chunks=2, loss_fn=loss_fn, seed=7)
    pipe.train_step(tokens(), tokens())
    total = pipe.clip_grad_norm_(max_norm, norm_type)
    return total, gradients(pipe)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_clipping_counts_a_parameter_once(two, max_norm, norm_type):
    module = language_model()
    pipe = make_pipe(module, [2, 2], 2)
    pipe.train_step(tokens(), tokens(), loss_fn)
    total = nn.utils.clip_grad_norm_(pipe.parameters(), max_norm, norm_type)
    for told, own in two.values(clip, max_norm, norm_type):
        assert torch.equal(told, total)
        assert_same(own, {name: gradients(module)[name] for name in own})


def many_cells():
    torch.manual_seed(4)
    return nn.Sequential(*(nn.Linear(5, 5) for _ in range(8)))


def clip_interleaved(rank):
    options = {"loss_over": "micro_batch", "schedule": "interleaved_one_f_one_b"}
    pipe = DistributedGPipe(many_cells(), [2, 2, 2, 2], chunks=4, loss_fn=squared, **options)
    norms = []
    for _ in range(20):
        pipe.train_step(batch(), -batch())
        norms.append(pipe.clip_grad_norm_(100.0))
    return norms


def test_norms_are_added_in_the_order_of_the_parameters(two):
    pipe = make_pipe(many_cells(), [8], 4)
    expected = []
    for _ in range(20):
        pipe.train_step(batch(), -batch(), squared, "micro_batch", schedule="one_f_one_b")
        expected.append(nn.utils.clip_grad_norm_(pipe.parameters(), 100.0))
    for told in two.values(clip_interleaved):
        assert_same(told, expected)


def clip_nothing(rank):
    pipe = DistributedGPipe(language_model(), [2, 2], chunks=2, loss_fn=loss_fn)
    before = pipe.clip_grad_norm_(1.0).item()
    for p in pipe.parameters():
        p.grad = torch.full_like(p, float("nan"))
    dist.barrier()
    with pytest.raises(RuntimeError, match=r"the norm of all gradients is nan, so they cannot be clipped: look for"):
        pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)
    return before


def test_without_gradients_and_with_bad_ones(two):
    assert two.values(clip_nothing) == [0.0, 0.0]


class Shares(nn.Linear):
    def __init__(self, other):
        super().__init__(4, 4)
        self.weight = other.weight


def untied(rank):
    pipe = DistributedGPipe(
        nn.Sequential(embedding := nn.Linear(4, 4), Shares(embedding), Shares(embedding), nn.Linear(4, 4)),
        [2, 2],
        chunks=1,
        loss_fn=squared,
    )
    (pipe.module[1] if rank == 0 else pipe.module[0]).weight = nn.Parameter(torch.zeros(4, 4))
    pipe.train_step(torch.ones(2, 4), torch.ones(2, 4))


# The step went on with the values from before.
def test_what_is_tied_may_not_be_exchanged_after_wrapping(two):
    for raised in two.run(untied):
        assert isinstance(raised, Raised)
        assert "the parameter 'weight' of a Shares, which several cells share, was exchanged after" in raised.text
