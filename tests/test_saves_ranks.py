"""Saves across ranks: what 4 wrote, 2, 1, ``GPipe`` and the bare module read, and back."""

import errno
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import PlainLoop, assert_same, linears, make_pipe
from test_distributed import cross_entropy, joined, wrapped
from test_exact import data, net
from test_train_step import LearnedLoss
from torch import nn
from worlds import World

from gpipe import Saves
from gpipe.saving.together import Together

BALANCES = {1: [6], 2: [4, 2], 4: [1, 2, 1, 2]}


@pytest.fixture(scope="module")
def worlds():
    made = {ranks: World(ranks) for ranks in (1, 2, 4)}
    yield made
    for world in made.values():
        world.close()


@pytest.fixture
def two(worlds):
    return worlds[2]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def destroyed(rank):
    together = Together()
    group = together._group
    told = together.each(lambda: rank)
    dist.destroy_process_group(group())
    with pytest.raises(RuntimeError, match=r"^the process group was destroyed: save, and wait for saves, before that"):
        together.each(lambda: rank)
    return told, group()


def test_a_group_ends_where_it_is_destroyed(two):
    assert two.values(destroyed) == [([0, 1], None)] * 2


# --- round trips ------------------------------------------------------------------------------------------------------


def other_net():
    """Of the same names, with other values."""
    module = net(0.1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1
    return module


def grouped(module):
    """Weights and biases with options of their own; either group of a rank may be empty."""
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [p for p in module.parameters() if p.dim() < 2], "lr": 0.02, "betas": (0.8, 0.9)},
        ],
        lr=0.01,
    )


def strange(optimizer):
    for group in optimizer.param_groups:
        group.update(lr=7.0, betas=(0.1, 0.2), weight_decay=3.0)


def one_step(step, optimizer, index):
    optimizer.zero_grad()
    loss = step(*data(9 + index))
    optimizer.step()
    return loss


def go_on(rank, balance, source, target, index):
    """Read what was saved, do one step of training, save."""
    pipe = wrapped(net(0.1) if source is None else other_net(), balance)
    optimizer = grouped(pipe)
    if source is not None:
        strange(optimizer)
        restored = Saves(source).read(pipe, optimizer)
        assert restored.step == index
        pipe.step = restored.extra["pipe_step"]
    one_step(pipe.train_step, optimizer, index)
    Saves(target).write(index + 1, pipe, optimizer, extra={"pipe_step": pipe.step})
    return dict(pipe.state_dict()), [group["lr"] for group in optimizer.param_groups]


def gpipe(module):
    pipe = make_pipe(module, [2, 3, 1], 4)
    return pipe, pipe, lambda x, y: pipe.train_step(x, y, cross_entropy)


def bare(module):
    loop = PlainLoop(module, 4)

    def step(x, y):
        cross_entropy(loop(x), y).backward()

    return module, loop, step


def go_on_alone(make, source, target, index):
    read, counter, step = make(other_net())
    optimizer = grouped(read)
    strange(optimizer)
    restored = Saves(source).read(read, optimizer)
    assert restored.step == index
    counter.step = restored.extra["pipe_step"]
    one_step(step, optimizer, index)
    Saves(target).write(index + 1, read, optimizer, extra={"pipe_step": counter.step})


def never_saved(steps):
    pipe = make_pipe(net(0.1), [3, 3], 4)
    optimizer = grouped(pipe)
    for index in range(steps):
        one_step(lambda x, y: pipe.train_step(x, y, cross_entropy), optimizer, index)
    return pipe.state_dict(), [group["lr"] for group in optimizer.param_groups]


def test_written_by_any_read_by_any(worlds, tmp_path):
    places = [tmp_path / str(i) for i in range(7)]
    worlds[4].values(go_on, BALANCES[4], None, places[0], 0)
    worlds[2].values(go_on, BALANCES[2], places[0], places[1], 1)
    worlds[1].values(go_on, BALANCES[1], places[1], places[2], 2)
    go_on_alone(gpipe, places[2], places[3], 3)
    go_on_alone(bare, places[3], places[4], 4)
    found = worlds[4].values(go_on, BALANCES[4], places[4], places[5], 5)
    found = worlds[4].values(go_on, [2, 1, 2, 1], places[5], places[6], 6)
    state, rates = never_saved(7)
    assert_same(joined([s for s, _ in found]), state)
    assert [r for _, r in found] == [rates] * 4


def save_a_loss(rank, folder, again):
    pipe = wrapped(linears(), [1, 2], 4, LearnedLoss(), loss_over="micro_batch")
    optimizer = torch.optim.Adam(pipe.parameters(), 0.1)
    if again:
        Saves(folder).read(pipe, optimizer)
        loss = {} if pipe.loss_fn is None else dict(pipe.loss_fn.state_dict())
        return dict(pipe.state_dict()), loss, optimizer.state_dict()["state"]
    torch.manual_seed(2)
    pipe.train_step(torch.ones(12, 4), torch.zeros(12, 4))
    optimizer.step()
    Saves(folder).write(1, pipe, optimizer)
    return dict(pipe.state_dict()), {} if pipe.loss_fn is None else dict(pipe.loss_fn.state_dict()), None


def test_a_loss_with_parameters_and_buffers(two, tmp_path):
    written = two.values(save_a_loss, tmp_path, False)
    torch.manual_seed(5)
    module, loss = linears(), LearnedLoss()
    optimizer = torch.optim.Adam([*loss.parameters(), *module.parameters()], 0.1)  # in another order
    Saves(tmp_path).read(module, optimizer, loss_fn=loss)
    assert_same(module.state_dict(), joined([state for state, _, _ in written]))
    assert_same(loss.state_dict(), written[1][1])
    assert loss.calls > 0
    assert optimizer.state[loss.scale]["exp_avg"].item() != 0

    Saves(tmp_path).write(2, module, optimizer, loss_fn=loss)
    (first, none, state), (last, found, loss_state) = two.values(save_a_loss, tmp_path, True)
    assert_same(first | last, module.state_dict())
    assert none == {}
    assert_same(found, loss.state_dict())
    assert len(state) == 2
    assert len(loss_state) == 5
    assert torch.equal(loss_state[4]["exp_avg"], optimizer.state[loss.scale]["exp_avg"])


def test_the_loss_may_be_left_out_for_evaluation_alone(two, tmp_path):
    two.values(save_a_loss, tmp_path, False)
    module = linears()
    assert Saves(tmp_path).read(module).step == 1
    with pytest.raises(ValueError, match=r"its loss has 'calls', 'scale', the loss here no state: give the loss"):
        Saves(tmp_path).read(module, torch.optim.Adam(module.parameters()))


def save_copies(rank, folder):
    """Every rank has the whole module."""
    module = linears()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    Saves(folder).write(1, module, optimizer)
    return dict(module.state_dict())


def test_what_several_ranks_have_is_written_once(two, tmp_path):
    state, same = two.values(save_copies, tmp_path)
    assert_same(state, same)
    sizes = [path.stat().st_size for path in (tmp_path / "step-000000001").glob("*.distcp")]
    Saves(tmp_path / "alone").write(1, linears())
    module = linears()
    Saves(tmp_path).read(module)
    assert_same(module.state_dict(), state)
    assert len(sizes) == 2
    assert abs(sizes[0] - sizes[1]) < sum(sizes) / 4  # each rank half of them


def save_in_groups(rank, folder):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, rank // 2)
    saves = Saves(folder / str(rank // 2), group=groups[rank // 2])
    saves.write(3, module)
    nn.init.constant_(module.weight, 9)
    saves.read(module)
    return module.weight[0, 0].item()


def test_a_group_saves_for_itself(worlds, tmp_path):
    assert worlds[4].values(save_in_groups, tmp_path) == [0, 0, 1, 1]


def save_in_the_group_of_others(rank, folder):
    groups = [dist.new_group([0]), dist.new_group([1])]
    return Saves(folder, group=groups[rank == 0])


def test_a_group_of_others(two, tmp_path):
    for result in two.run(save_in_the_group_of_others, tmp_path):
        assert result.type == "ValueError"
        assert "is not in the group given" in result.message


# --- behind training's back -------------------------------------------------------------------------------------------


def write_and_change(rank, folder):
    pipe = wrapped(net(0.1), BALANCES[2])
    optimizer = grouped(pipe)
    saves = Saves(folder)
    states = []
    for index in range(3):
        one_step(pipe.train_step, optimizer, index)
        saves.write(index, pipe, optimizer, wait=False)
        states.append({key: value.clone() for key, value in pipe.state_dict().items()})
        with torch.no_grad():
            for parameter in pipe.parameters():
                parameter.fill_(99)
                optimizer.state[parameter]["exp_avg"].fill_(99)
    saves.wait()
    return states


def test_what_training_changes_later_is_not_in_the_save(two, tmp_path):
    first, last = two.values(write_and_change, tmp_path)
    module = net(0.1)
    optimizer = grouped(module)
    assert Saves(tmp_path).read(module, optimizer).step == 2
    assert_same(module.state_dict(), first[2] | last[2])
    assert all(not (optimizer.state[p]["exp_avg"] == 99).any() for p in module.parameters())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_whole(saves, pipe, wait):
    saves.write(2, pipe, wait=wait)
    saves.wait()


def write_to_a_full_disk(rank, folder, full, wait):
    pipe = wrapped(linears(), [1, 2], 3, F.mse_loss)
    saves = Saves(folder)
    saves.write(1, pipe)
    before = files(folder)
    fsync = os.fsync
    if rank == full:
        os.fsync = full_disk
    try:
        with pytest.raises(OSError, match="cannot be written") as caught:
            write_whole(saves, pipe, wait)
    finally:
        os.fsync = fsync
    dist.barrier()
    intact = files(folder) == before
    dist.barrier()
    return str(caught.value), intact, saves.write(3, pipe).name


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_is_told_to_all(two, tmp_path, full, wait):
    for message, intact, later in two.values(write_to_a_full_disk, tmp_path, full, wait):
        assert message == (
            f"{tmp_path}/step-000000002 cannot be written: rank {full}: [Errno 28] No space left on device; "
            "the saves before it are as they were"
        )
        assert intact
        assert later == "step-000000003"


def interrupt_one(rank, folder):
    pipe = wrapped(linears(), [1, 2], 3, F.mse_loss)
    saves = Saves(folder)
    saves.write(1, pipe)
    fsync = os.fsync

    def interrupted(descriptor):
        raise KeyboardInterrupt

    if rank == 1:
        os.fsync = interrupted
    try:
        saves.write(2, pipe)
    finally:
        os.fsync = fsync


def test_an_interrupted_rank_ends_the_save_of_all(two, tmp_path):
    first, second = two.run(interrupt_one, tmp_path)
    assert (first.type, second.type) == ("RuntimeError", "KeyboardInterrupt")
    assert "rank 1: KeyboardInterrupt" in first.message
    assert Saves(tmp_path).read(linears()).step == 1


def disagree(rank, folder, how):
    pipe = wrapped(linears(), [1, 2], 3, F.mse_loss)
    saves = Saves(folder)
    if how == "steps":
        return saves.write(rank, pipe)
    if how == "optimizers":
        return saves.write(1, pipe, (torch.optim.SGD, torch.optim.Adam)[rank](pipe.parameters()))
    if how == "foreign":
        extra = [nn.Parameter(torch.ones(3, 2))] * rank
        return saves.write(1, pipe, torch.optim.Adam([*pipe.parameters(), *extra]))
    module = nn.Linear(2, 2 + rank)
    return saves.write(1, module)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("steps", "all ranks must save the same step, but they were given 0, 1"),
        ("optimizers", "all ranks must have the same optimizer, but they have Adam, SGD"),
        ("foreign", r"rank 1: parameter 4 of the optimizer's group 0, of shape \(3, 2\), belongs neither"),
        ("shapes", r"'model.weight' is float32 of shape \(2, 2\) on rank 0 and float32 of shape \(3, 2\) on rank 1"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_on_all(two, tmp_path, how, message):
    for result in two.run(disagree, tmp_path, how):
        assert result.type == "ValueError"
        with pytest.raises(ValueError, match=message):
            raise ValueError(result.message)
    assert not list(tmp_path.iterdir())


def save_in_parts(rank, folder):
    pipe = wrapped(linears(), [1, 2], 3, F.mse_loss)
    alone = [dist.new_group([0]), dist.new_group([1])]
    Saves(folder, group=alone[rank]).write(1, pipe)


def test_a_part_of_a_pipe_is_no_save(two, tmp_path):
    for result in two.run(save_in_parts, tmp_path):
        assert result.type == "ValueError"
        assert "all ranks of a DistributedGPipe must save together" in result.message


def read_with_failing_rank(rank, folder, where):
    pipe = wrapped(linears(), [1, 2], 3, F.mse_loss)
    optimizer = torch.optim.Adam(pipe.parameters())
    before = {key: value.clone() for key, value in pipe.state_dict().items()}
    if rank == 1:

        def fail(*_):
            raise ValueError("no")

        if where == "load":
            optimizer.register_load_state_dict_post_hook(fail)
        else:
            pipe.module[1] = nn.Linear(4, 5)
    try:
        Saves(folder).read(pipe, optimizer)
    except ValueError as error:
        kept = {key: value for key, value in pipe.state_dict().items() if key in before and key[0] != "2"}
        return str(error), all(torch.equal(value, before[key]) for key, value in kept.items()), len(optimizer.state)


@pytest.mark.parametrize(
    ("where", "message"),
    [("load", "rank 1: no"), ("shape", r"rank 1: model.2.\w+ is float32 of shape .* in it, but")],
)
def test_no_rank_is_left_half_loaded(two, tmp_path, where, message):
    torch.manual_seed(3)
    module = linears()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    Saves(tmp_path).write(1, module, optimizer)
    for told, kept, states in two.values(read_with_failing_rank, tmp_path, where):
        with pytest.raises(ValueError, match=message):
            raise ValueError(told)
        assert kept
        assert states == 0


def read_damaged(rank, folder):
    pipe = wrapped(linears(), [1, 2], 3, F.mse_loss)
    told = []
    try:
        restored = Saves(folder).read(pipe, warn=told.append)
    except RuntimeError as error:
        return str(error), told
    return restored.step, told


def test_damage_is_found_by_rank_0_for_all(two, tmp_path):
    saves = Saves(tmp_path)
    paths = [saves.write(step, linears()) for step in (1, 2)]
    (paths[1] / "__0_0.distcp").write_bytes(b"x")
    (first, told), (second, silent) = two.values(read_damaged, tmp_path)
    assert (first, second, silent) == (1, 1, [])
    assert len(told) == 1
    (paths[0] / "save.json").unlink()
    for message, _ in two.values(read_damaged, tmp_path):
        assert "none of the 2 saves" in message


def die_while_saving(rank, folder, victim, waits):
    pipe = wrapped(linears(6), [1, 1, 2, 2], 3, F.mse_loss)
    saves = Saves(folder)
    saves.write(1, pipe)
    if rank == victim:
        os.fsync = lambda descriptor: os.kill(os.getpid(), 9)
    saves.write(2, pipe, wait=False)
    if waits:
        saves.wait()


@pytest.mark.parametrize(("victim", "waits"), [(0, True), (2, True), (2, False)])
def test_a_dead_rank_keeps_no_other_waiting(tmp_path, victim, waits):
    world = World(4)
    try:
        world.start(die_while_saving, tmp_path, victim, waits)
        others = [rank for rank in range(4) if rank != victim]
        for result in world.results(others):
            if waits:
                assert result.type == "RuntimeError"
                assert "can no longer be reached" in result.message
        for pipe in world._pipes:
            pipe.close()
        for rank in others:  # nor does the end of its program wait
            world.processes[rank].join(20)
            assert world.processes[rank].exitcode is not None
        assert Saves(tmp_path).read(linears(6)).step == 1
    finally:
        world.kill()
