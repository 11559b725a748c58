"""``DistributedGPipe``: the same bits as ``GPipe`` on threads, one process a stage."""

import functools
import gc
import threading
import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import Apply, Island, assert_same, gradients, make_pipe
from test_exact import data, net
from test_train_step import LearnedLoss
from torch import nn
from worlds import World

from gpipe import schedules
from gpipe.distributed import DistributedGPipe
from gpipe.ranks.slicing import initialised

SPLITS = {2: [4, 2], 4: [1, 2, 1, 2]}


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


@pytest.fixture(params=[2, 4])
def world(request):
    return request.getfixturevalue("two" if request.param == 2 else "four")


def cross_entropy(output, target):
    return F.cross_entropy(output.transpose(1, 2), target)


def wrapped(module, balance=None, chunks=4, loss_fn=cross_entropy, seed=7, **options):
    return DistributedGPipe(module, balance, chunks=chunks, loss_fn=loss_fn, seed=seed, **options)


def trained(step, parameters, rows):
    """A few steps, the last mini-batches of other sizes."""
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for n in (rows, rows, 3):
        optimizer.zero_grad()
        x, y = data(n)
        losses.append(step(x, y))
        optimizer.step()
    return losses


def joined(states):
    """The slices of all ranks as one; no two ranks hold the same."""
    whole = {key: value for state in states for key, value in state.items()}
    assert len(whole) == sum(map(len, states))
    return whole


# --- the same bits ----------------------------------------------------------------------------------------------------


def train_on_ranks(rank, balance, rows, **options):
    pipe = wrapped(net(0.1), balance, **options)
    losses = trained(pipe.train_step, pipe.parameters(), rows)
    return dict(pipe.state_dict()), losses


@functools.cache
def on_threads(ranks, rows, loss_over, schedule, keep):
    module = net(0.1)
    pipe = make_pipe(module, SPLITS[ranks], 4, keep)
    step = functools.partial(pipe.train_step, loss_fn=cross_entropy, loss_over=loss_over, schedule=schedule)
    losses = trained(step, module.parameters(), rows)
    return module.state_dict(), losses


def run(rank, *args):
    *positional, options = args
    return train_on_ranks(rank, *positional, **options)


@pytest.mark.parametrize("keep", ["always", "except_last", "never"])
@pytest.mark.parametrize(
    ("loss_over", "schedule", "rows"),
    [
        ("mini_batch", "gpipe", 11),
        ("mini_batch", "gpipe_zero_bubble", 12),
        ("micro_batch", "gpipe", 12),
        ("micro_batch", "one_f_one_b", 11),
        ("micro_batch", "zero_bubble_h1", 11),
    ],
)
def test_the_weights_are_those_of_threads_to_the_last_bit(world, loss_over, schedule, rows, keep):
    ranks = len(world.processes)
    options = {"loss_over": loss_over, "schedule": schedule, "checkpoint": keep}
    found = world.values(run, SPLITS[ranks], rows, options)
    state, losses = on_threads(ranks, rows, loss_over, schedule, keep)
    assert_same(joined([s for s, _ in found]), state)
    for _, told in found:
        assert_same(told, losses)


def test_several_stages_on_a_rank(two):
    options = {"loss_over": "micro_batch", "schedule": "interleaved_one_f_one_b"}
    found = two.values(run, [1, 2, 1, 2], 11, options)
    state, losses = on_threads(4, 11, "micro_batch", "interleaved_one_f_one_b", "except_last")
    assert [list(dict.fromkeys(key[0] for key in s)) for s, _ in found] == [["0", "3"], ["1", "4", "5"]]
    assert_same(joined([s for s, _ in found]), state)
    assert_same(found[0][1], losses)


def test_a_balance_of_its_own(two):
    found = two.values(run, None, 12, {"loss_over": "micro_batch", "schedule": schedules.one_f_one_b})
    state, _ = on_threads(2, 12, "micro_batch", "one_f_one_b", "except_last")
    assert_same(joined([s for s, _ in found]), state)  # no balance changes the bits


def tie():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    module[2].weight = module[0].weight
    return module


def train_tied(rank):
    pipe = wrapped(tie(), [3, 1])
    losses = trained(pipe.train_step, pipe.parameters(), 11)
    return dict(pipe.state_dict()), losses


def test_cells_of_a_rank_may_share_a_parameter(two):
    found = two.values(train_tied)
    module = tie()
    step = functools.partial(make_pipe(module, [3, 1], 4).train_step, loss_fn=cross_entropy)
    losses = trained(step, module.parameters(), 11)
    assert_same(joined([s for s, _ in found]), module.state_dict())
    assert found[0][1] == losses


def learn_the_loss(rank, loss_over):
    torch.manual_seed(1)
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    loss_fn = LearnedLoss()
    pipe = wrapped(module, [1, 2], 4, loss_fn, loss_over=loss_over)
    x, y = torch.ones(12, 4), torch.zeros(12, 4)
    torch.manual_seed(2)
    pipe.train_step(x, y)
    return gradients(pipe), list(pipe.state_dict())


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_a_loss_with_parameters(two, loss_over):
    torch.manual_seed(1)
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    loss_fn = LearnedLoss()
    pipe = make_pipe(module, [1, 2], 4)
    torch.manual_seed(2)
    pipe.train_step(torch.ones(12, 4), torch.zeros(12, 4), loss_fn, loss_over)
    (first, _), (last, keys) = two.values(learn_the_loss, loss_over)
    assert_same(first | last, gradients(module) | {"loss_fn.scale": loss_fn.scale.grad})
    assert first.keys() == {"0.weight", "0.bias"}
    assert keys == ["1.weight", "1.bias", "2.weight", "2.bias"]


def accumulate(rank):
    pipe = wrapped(net(0.1), [4, 2])
    seen = []
    first = next(iter(pipe.parameters()))
    first.register_hook(lambda g: seen.append(g.clone()))
    x, y = data(11)
    x = x.clone().requires_grad_()
    for _ in range(2):
        pipe.train_step(x, y)
    return gradients(pipe), torch.equal(first.grad, seen[0] + seen[1]), len(seen), x.grad


def test_gradients_add_up_and_hooks_run_once_a_step(two):
    module = net(0.1)
    pipe = make_pipe(module, [4, 2], 4)
    x, y = data(11)
    x = x.clone().requires_grad_()
    for _ in range(2):
        pipe.train_step(x, y, cross_entropy)
    found = two.values(accumulate)
    assert_same(found[0][0] | found[1][0], gradients(module))
    assert [(same, calls) for _, same, calls, _ in found] == [(True, 2), (True, 2)]
    assert torch.equal(found[0][3], x.grad)
    assert found[1][3] is None


# --- what passes a boundary -------------------------------------------------------------------------------------------


def widen(x, linear):
    """Everything a tree can hold: views of one tensor, strides, other types, None, empty, plain, the same twice."""
    y = linear(x)
    return {
        "halves": y.chunk(2, dim=1),
        "turned": y.t().contiguous().t(),
        "mask": y > 0,
        "order": y.argsort(dim=1),
        "wide": y.double(),
        "picked": linear(x.unsqueeze(1).expand(-1, 3, -1))[:, 0],
        "none": None,
        "empty": y[:, :0],
        "name": ("a", 1.5),
        "again": [y, y],
        "complex": torch.complex(y.float(), y.float()),
        "spread": y[:, :1].expand(-1, 4),
    }


def narrow(tree, linear):
    a, b = tree["halves"]
    y = torch.cat([b, a], dim=1) + torch.where(tree["mask"], tree["turned"], 0.5) + tree["wide"].float()
    y = y + y.gather(1, tree["order"]) + tree["picked"] + tree["empty"].sum() + tree["complex"].real + tree["spread"]
    assert tree["none"] is None
    assert tree["name"] == ("a", 1.5)
    assert tree["again"][0] is tree["again"][1]
    assert len(y) == 1 or tree["turned"].stride() == (1, len(y))
    assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return linear(y + tree["again"][0] * tree["again"][1])


def trees():
    torch.manual_seed(3)
    return nn.Sequential(Apply(widen, nn.Linear(4, 4)), Apply(narrow, nn.Linear(4, 4)))


def mean_square(output, target):
    return ((output - target) ** 2).mean()


def pass_trees(rank, keep, autocast):
    pipe = wrapped(trees(), [1, 1], 3, mean_square, checkpoint=keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for rows in (8, 7, 2):
            x = torch.arange(rows * 4).float().reshape(rows, 4).sin()
            pipe.train_step(x, x)
    return gradients(pipe)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("keep", ["always", "never"])
def test_any_tree_passes_to_another_rank(two, keep, autocast):
    module = trees()
    pipe = make_pipe(module, [1, 1], 3, keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for rows in (8, 7, 2):
            x = torch.arange(rows * 4).float().reshape(rows, 4).sin()
            pipe.train_step(x, x, mean_square)
    assert_same(joined(two.values(pass_trees, keep, autocast)), gradients(module))


def keep_to_its_own_autocast(rank, loss_over):
    torch.manual_seed(3)
    pipe = wrapped(nn.Sequential(nn.Linear(4, 4), Island()), [1, 1], 2, mean_square, loss_over=loss_over)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(6, 4)
        pipe.train_step(x, x)
    return gradients(pipe)


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_autocast_is_the_callers_forward_and_off_backward(two, loss_over):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), Island())
    pipe = make_pipe(module, [1, 1], 2)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.ones(6, 4)
        pipe.train_step(x, x, mean_square, loss_over)
    assert_same(joined(two.values(keep_to_its_own_autocast, loss_over)), gradients(module))


def without_gradients(rank, frozen):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).requires_grad_(not frozen)
    pipe = wrapped(module, [1, 2], 2, LearnedLoss())
    pipe.train_step(torch.ones(6, 4), torch.ones(6, 4))
    return gradients(pipe)


def test_a_frozen_model_under_a_loss_that_learns(two):
    first, last = two.values(without_gradients, True)
    assert set(first.values()) == {None}
    assert [name for name, g in last.items() if g is not None] == ["loss_fn.scale"]


def end_without_parameters(rank, loss_over):
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    pipe = wrapped(module, [1, 1], 2, mean_square, loss_over=loss_over)
    pipe.train_step(torch.ones(6, 4), torch.zeros(6, 4))
    return gradients(pipe)


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_a_last_stage_without_parameters(two, loss_over):
    first, _ = two.values(end_without_parameters, loss_over)
    assert all(g is not None for g in first.values())


# --- evaluation, states -----------------------------------------------------------------------------------------------


def evaluate(rank):
    pipe = wrapped(net(0.5), [4, 2])
    drawn = pipe(data(11)[0])
    pipe.eval()
    return drawn, pipe.eval_step(data(11)[0] if rank == 0 else None), pipe.step


def test_forward_gives_outputs_on_the_last_rank(two):
    module = net(0.5)
    pipe = make_pipe(module, [4, 2], 4)
    drawn = pipe(data(11)[0])
    pipe.eval()
    expected = pipe(data(11)[0])
    first, last = two.values(evaluate)
    assert first == (None, None, 1)
    assert torch.equal(last[0], drawn)
    assert torch.equal(last[1], expected)
    assert not last[1].requires_grad


def reload(rank, state):
    pipe = wrapped(net(0.1), SPLITS[4])
    pipe.load_state_dict(state)
    found = dict(pipe.state_dict())
    pipe.load_state_dict(found)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*nowhere"):
        pipe.load_state_dict(state | {"nowhere": torch.ones(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        pipe.load_state_dict({})
    with pytest.raises(ValueError, match="assign=True would replace"):
        pipe.load_state_dict(state, assign=True)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pipe.__getstate__()
    for move in (pipe.cuda, pipe.cpu, lambda: pipe.to("cpu")):
        with pytest.raises(TypeError, match="a rank's stages stay on its device, cpu: give device= when wrapping"):
            move()
    return found, [name for name, _ in pipe.named_parameters()], repr(pipe)


def test_a_rank_takes_its_part_of_a_whole_state(four):
    torch.manual_seed(9)
    state = {key: torch.randn_like(value) for key, value in net(0.1).state_dict().items()}
    found = four.values(reload, state)
    assert_same(joined([s for s, _, _ in found]), state)
    assert all(names == list(s) for s, names, _ in found)
    assert "rank=3, stage 3 (cells" in found[3][2]


def train_two(rank):
    pipes = [wrapped(net(0.1), [4, 2]), wrapped(net(0.1), [1, 5], checkpoint="always")]
    optimizers = [torch.optim.Adam(pipe.parameters(), 0.01) for pipe in pipes]
    for n in (11, 11, 3):
        for pipe in pipes:
            pipe.train_step(*data(n))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [dict(pipe.state_dict()) for pipe in pipes]


def test_two_pipes_at_once(two):
    found = two.values(train_two)
    state, _ = on_threads(2, 11, "mini_batch", "gpipe", "except_last")
    for states in zip(*found, strict=True):
        assert_same(joined(states), state)


def leave_no_threads(rank):
    gc.collect()
    before = len(threads())
    pipe = wrapped(net(0.1), [4, 2])
    pipe.train_step(*data(11))
    during = len(threads())
    for out in pipe._calls.wires.outgoing.values():
        out.after(partial(time.sleep, 0.2))  # one that is not done when the pipe goes
    del pipe, out
    gc.collect()
    return before, during > before, len(threads())


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gpipe-")]


def test_a_collected_pipe_leaves_no_threads(two):
    for before, during, after in two.values(leave_no_threads):
        assert during
        assert after == before


# --- factories --------------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """With initial values that no ``reset_parameters`` makes."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(0.3 * torch.randn(8))
        self.linear = nn.Linear(8, 8)
        nn.init.orthogonal_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias[2:4] = 0.25
        self.register_buffer("table", torch.arange(8).float().sin() + torch.tensor([0.5]))

    def forward(self, x):
        return self.linear(x) * self.scale + self.table


def factory():
    module = nn.Sequential(nn.Linear(5, 8), Own(), nn.Dropout(0.1), Own(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    module[3].linear.weight = module[3].linear.weight  # the same parameter again
    for cell in (module[0], module[5]):
        nn.init.normal_(cell.weight, std=0.2)
    return module


def make_by_slices(rank, balance, keep):
    pipe = DistributedGPipe(factory, balance, chunks=3, loss_fn=F.cross_entropy, seed=5, checkpoint=keep)
    state = {key: value.clone() for key, value in pipe.state_dict().items()}
    assert not any(t.is_meta for t in (*pipe.parameters(), *pipe.buffers()))
    torch.manual_seed(8)
    pipe.train_step(torch.randn(9, 5), torch.randint(0, 3, (9,)))
    return state, gradients(pipe)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_factory_is_made_by_slices_with_the_weights_of_the_whole(two, four, ranks):
    balance = [3, 3] if ranks == 2 else [1, 2, 1, 2]
    module = initialised(factory, seed=5)
    expected = {key: value.clone() for key, value in module.state_dict().items()}
    found = (two if ranks == 2 else four).values(make_by_slices, balance, "always")
    assert_same(joined([state for state, _ in found]), expected)
    torch.manual_seed(8)
    make_pipe(module, [1] * 6, 3, seed=5).train_step(torch.randn(9, 5), torch.randint(0, 3, (9,)), F.cross_entropy)
    assert_same(joined([g for _, g in found]), gradients(module))
