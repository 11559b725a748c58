"""A failure on one rank ends the step on all, at once; what cannot work is refused on every rank alike."""

import functools
import os
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from nets import Apply
from test_failures import Bomb
from torch import nn
from worlds import Raised, World

from gpipe import schedules
from gpipe.distributed import DistributedGPipe

PROMPT = 10.0  # seconds


@pytest.fixture(scope="module")
def three():
    world = World(3)
    yield world
    world.close()


def make(module=None, **options):
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)) if module is None else module
    given = {"balance": [1, 1, 1], "chunks": 4, "loss_fn": F.mse_loss, "seed": 7} | options
    return DistributedGPipe(module, **given)


def broken(pipe):
    """What a pipe says when it is used again."""
    said = []
    for call in (pipe.train_step, pipe.eval_step, pipe):
        try:
            call(torch.ones(8, 4), torch.ones(8, 4)) if call == pipe.train_step else call(torch.ones(8, 4))
        except RuntimeError as error:
            said.append(str(error))
    return said


def explode(rank, at, error, phase, schedule):
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    bomb = module[at] = Bomb()
    pipe = make(module, checkpoint="always", loss_over="micro_batch", schedule=schedule)
    x = torch.ones(8, 4)
    pipe.train_step(x, x)
    before = [p.grad.clone() for p in pipe.parameters()]
    bomb.arm(error("boom"), phase, calls=2)  # on the other ranks it is in no stage
    start = time.monotonic()
    try:
        pipe.train_step(x, x)
    except BaseException as caught:  # user code that lives on
        kept = all(map(torch.equal, before, [p.grad for p in pipe.parameters()]))
        return Raised(caught, time.monotonic() - start), broken(pipe), kept
    return None


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "phase", "schedule"),
    [
        (ValueError, "forward", "one_f_one_b"),
        (KeyboardInterrupt, "recompute", "gpipe"),
        (SystemExit, "backward", "gpipe"),
    ],
)
def test_what_a_cell_raises_ends_the_step_on_every_rank(three, at, error, phase, schedule):
    found = three.run(explode, at, error, phase, schedule)
    action = {"forward": f"{at}F1", "recompute": f"{at}R2", "backward": f"{at}B2"}[phase]
    for rank, (raised, said, kept) in enumerate(found):
        assert raised.seconds < PROMPT
        assert kept, rank
        where = rf"stage {at} (cells {at} to {at}, cpu)"
        if rank == at:
            assert (raised.type, raised.message) == (error.__name__, "boom")
            assert [n for n in raised.notes if f"raised in {where}" in n and n.endswith(f"action {action}")]
        else:
            assert raised.type == "OtherRankFailed"
            assert f"rank {at} failed in step 1 with {error.__name__}: boom (raised in {where}" in raised.message
            assert f"action {action}); the step was ended on rank {rank} too" in raised.message
        assert len(said) == 3
        assert all(f"this pipe is broken: rank {at} failed in step 1 with {error.__name__}: boom" in s for s in said)


WRONG = {  # what is called, with what, on the rank that does wrong
    "no inputs": ("train_step", None, torch.ones(8, 4)),
    "no targets": ("train_step", torch.ones(8, 4), None),
    "rows": ("train_step", torch.ones(8, 4), torch.ones(7, 4)),
    "input": ("train_step", 3, torch.ones(8, 4)),
    "shape": ("train_step", torch.ones(8, 5), torch.ones(8, 4)),
    "loss": ("train_step", torch.ones(8, 4), torch.ones(8, 5)),
    "other call": ("eval_step", torch.ones(8, 4)),
}


def call_wrongly(rank, case, at):
    pipe = make()
    if case == "mode" and rank == at:
        pipe.eval()
    right = ("train_step", torch.ones(8, 4), torch.ones(8, 4))
    name, *arguments = WRONG.get(case, right) if rank == at else right
    start = time.monotonic()
    try:
        with torch.set_grad_enabled(not (case == "no_grad" and rank == at)):
            getattr(pipe, name)(*arguments)
    except Exception as error:
        return Raised(error, time.monotonic() - start)
    return None


@pytest.mark.parametrize(
    ("case", "at", "message"),
    [
        ("no inputs", 0, "rank 0 hosts the first stage and was given no inputs: give them to it, at least"),
        ("no targets", 2, "rank 2 hosts the last stage and was given no targets: give them to train_step there"),
        ("rows", 2, "inputs have 8 rows, targets have 7: give one target per row"),
        ("input", 0, "a mini-batch needs at least one tensor with a batch dimension"),
        ("shape", 0, "mat1 and mat2 shapes cannot be multiplied"),
        ("loss", 2, "The size of tensor a (4) must match the size of tensor b (5)"),
        ("no_grad", 0, "train_step computes gradients: call it outside torch.no_grad()"),
        ("mode", 1, "rank 0 calls train_step in training mode after 0 steps, rank 1 train_step in eval mode after 0"),
        ("other call", 2, "rank 0 calls train_step in training mode after 0 steps, rank 2 forward in training mode"),
    ],
)
def test_a_wrong_call_is_refused_on_every_rank(three, case, at, message):
    for rank, raised in enumerate(three.run(call_wrongly, case, at)):
        assert raised.seconds < PROMPT
        assert message in raised.message
        assert (f"rank {at} failed in step 0" in raised.message) == (rank != at)


def nap(x, linear, path):
    """A cell that says, on some input, that it is there, and is slow."""
    if x.max() > 1:
        path.touch()
        time.sleep(1.5)
    return linear(x)


def wait_for_a_slow_rank(rank, path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    slow = Apply(functools.partial(nap, path=path), nn.Linear(4, 4))
    pipe = make(nn.Sequential(nn.Identity(), slow, nn.Linear(4, 4)), chunks=1)
    start = time.monotonic()
    try:
        pipe.train_step(torch.ones(8, 4), torch.ones(8, 4))  # after it all are in the next
        pipe.train_step(torch.full((8, 4), 2.0), torch.ones(8, 4))
    except BaseException as error:
        return Raised(error, time.monotonic() - start)
    return None


@pytest.mark.parametrize("at", [0, 2])
def test_ctrl_c_on_a_rank_that_waits(three, tmp_path, at):
    path = tmp_path / "reached"
    three.start(wait_for_a_slow_rank, path)
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    os.kill(three.processes[at].pid, signal.SIGINT)
    for rank, raised in enumerate(three.results(range(3))):
        assert raised.seconds < PROMPT
        if rank == at:
            assert raised.type == "KeyboardInterrupt"
        else:
            assert f"rank {at} failed in step 1 with KeyboardInterrupt" in raised.message


def die(rank, at):
    pipe = make()
    x = torch.ones(8, 4)
    pipe.train_step(x, x)
    if rank == at:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        pipe.train_step(x, x)
    except Exception as error:
        return Raised(error, time.monotonic() - start)
    return None


@pytest.mark.parametrize("at", [0, 2])  # rank 0 keeps the store
def test_a_rank_that_dies_is_noticed(at):
    world = World(3)
    try:
        world.start(die, at)
        for raised in world.results({0, 1, 2} - {at}):
            assert raised.seconds < PROMPT
            lost = f"rank {at} cannot be reached", "the store of the process group was lost"
            assert any(text in raised.message for text in lost[: 2 - min(at, 1)]), raised.text
    finally:
        world.kill()


# --- arguments --------------------------------------------------------------------------------------------------------


def refuse(rank, by_rank):
    start = time.monotonic()
    options = dict(by_rank.get(rank, by_rank["else"]))
    module = options.pop("module", None)
    try:
        make(module() if module is not None and options.pop("build", True) else module, **options)
    except Exception as error:
        return Raised(error, time.monotonic() - start)
    return None


def shared():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.ReLU(), linear)


def short():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


def wider():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 4))


def no_module():
    return 3


def from_python():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(torch.frombuffer(bytearray(64), dtype=torch.float32).reshape(4, 4).to("meta"))
    return module


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        ({"else": {"balance": [1, 2]}}, "runs 2 stages on 2 ranks, one a worker, but the pipeline has 3: start 2 proc"),
        ({"else": {"balance": [1, 1, 2]}}, "balance must sum to the number of cells: the module has 3"),
        (
            {"else": {"balance": None, "module": short}},
            "the pipeline has 3 ranks, which makes 3 stages, but the module has 2 cells",
        ),
        ({"else": {"schedule": "interleaved_one_f_one_b"}}, "stages must be a multiple of stages_per_worker, got 3"),
        ({"else": {"schedule": "one_f_one_b"}}, "interleaves forward and backward.*use loss_over='micro_batch'"),
        ({"else": {"mesh": 1}}, "mesh must be a torch.distributed DeviceMesh, got int: make one with"),
        ({"else": {"loss_fn": None}}, "loss_fn must be callable"),
        ({"else": {"loss_over": "batch"}}, "loss_over must be 'mini_batch' or 'micro_batch', got 'batch'"),
        ({"else": {"module": shared}}, "every module with parameters, and every buffer, must belong to one stage"),
        ({"else": {"module": no_module}}, "a module, or a callable without arguments that makes one, got int"),
        ({"else": {"module": no_module, "build": False}}, "the factory must return an nn.Module, got int"),
        (
            {"else": {"schedule": schedules.gpipe(stages=2, micro_batches=4)}},
            "is for 2 stages and 4 micro-batches, but there are 3 and 4",
        ),
        ({"else": {}, 1: {"chunks": 0}}, "chunks, the number of micro-batches, must be at least 1, got 0"),
        ({"else": {}, 2: {"chunks": 5}}, "they differ in chunks: ranks 0, 1 have 4, rank 2 has 5"),
        ({"else": {}, 0: {"seed": 8}}, "they differ in seed: ranks 1, 2 have 7, rank 0 has 8"),
        (
            {"else": {}, 1: {"module": wider}},
            r"they differ in cell 1: ranks 0, 2 have '1', Linear with weight \(4, 4\) torch.*rank 1.*; in cell 2",
        ),
        ({"else": {}, 1: {"checkpoint": 0}}, "they differ in checkpoint: ranks 0, 2 have 'except_last', rank 1 has 0"),
    ],
)
def test_bad_arguments_are_refused_on_every_rank(three, by_rank, message):
    found = three.run(refuse, by_rank)
    for raised in found:
        assert raised is not None
        assert raised.seconds < PROMPT
        with pytest.raises(ValueError, match=message):
            raise ValueError(raised.message)
    assert three.values(refuse, {"else": {}}) == [None] * 3


def test_a_world_is_needed():
    with pytest.raises(RuntimeError, match=r"needs a process group: start the program with torchrun and call"):
        make()
