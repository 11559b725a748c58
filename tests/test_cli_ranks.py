"""`gpipe train` on every rank of a world: the bits of one process, one voice, one end."""

import itertools
import json
import os
import signal
import time
import warnings
from typing import NamedTuple
from unittest import mock

import pytest
import tiny_run
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from worlds import World

from gpipe.models.clip import clip
from gpipe.models.contrastive import ContrastiveLoss
from gpipe.training.world import Ranks, joined

PROMPT = 10.0  # seconds
CONSTANT = "training.schedule={name: constant}"


class Said(NamedTuple):
    """What a rank's command left."""

    code: int
    out: str
    errors: str
    seconds: float


@pytest.fixture(scope="module")
def two():
    world = World(2)
    yield world
    world.close()


def command(rank, arguments, environment):
    """``gpipe`` with these arguments on a rank; a list of arguments for each rank, or one for all."""
    from typer.testing import CliRunner

    from gpipe.training.cli import app

    own = arguments[rank] if isinstance(arguments[0], list) else arguments
    given = {"WORLD_SIZE": "2", "COLUMNS": "200", "TORCHELASTIC_RUN_ID": "job 1"} | environment
    began = time.monotonic()
    result = CliRunner().invoke(app, own, env=given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Said(result.exit_code, result.stdout, result.stderr, time.monotonic() - began)


def gpipe(world, *arguments, **environment):
    """The same command on all ranks: what each of them said."""
    return world.values(command, list(map(str, arguments)), environment)


def train(world, file, *overrides, resume=False, **environment):
    options = itertools.chain.from_iterable(("--set", override) for override in overrides)
    return gpipe(world, "train", file, *options, *(["--resume"] if resume else []), **environment)


def weights(folder):
    return (folder / "weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    tiny_run.run(tiny_run.write(folder))
    return weights(folder / "run")


def at_step(number):
    """Whether this is the step, counted from 1, that the environment names."""
    return os.environ.get("AT_STEP") == str(number)


class Loss(ContrastiveLoss):
    """Signals its own process, or gives no number, in the step that the environment names."""

    calls = 0

    def forward(self, outputs, targets=None):
        self.calls += 1
        loss = super().forward(outputs, targets)
        if not at_step(self.calls):
            return loss
        if "SIGNAL" in os.environ:
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
            return loss
        return loss * float("nan")


class Bomb(nn.Module):
    """A cell that does not like the second micro-batch of the step that the environment names."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        step, call = divmod(self.calls, 5)  # three micro-batches, two of which are recomputed
        self.calls += 1
        if at_step(step + 1) and call == 1:
            raise ValueError("boom")
        return x


class WithBomb(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.clip = clip(**arguments)
        self.bomb = Bomb()

    def cells(self):
        return [*self.clip.cells(), self.bomb]


def with_bomb(**arguments):
    return WithBomb(**arguments)


def with_frozen_image_tower(**arguments):
    model = clip(**arguments)
    model.visual.requires_grad_(False)
    return model


def own(factory):
    """The section of a file for a model of this module."""
    return {"factory": f"test_cli_ranks.{factory}", "arguments": tiny_run.TINY["model"]["arguments"]}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["pipeline.balance=[1, 6]", "pipeline.checkpoint=[0, 2]", "training.clip_gradient_norm=0.1"],
        ["training.precision=bfloat16", "pipeline.schedule=gpipe_zero_bubble"],
        ["pipeline.schedule=one_f_one_b", "pipeline.loss_over=micro_batch", "optimizer={name: SGD, lr: 0.1}"],
        ["pipeline.schedule=interleaved_one_f_one_b", "pipeline.loss_over=micro_batch", "pipeline.stages=4"],
    ],
)
def test_ranks_train_to_the_bits_of_one_process(two, tmp_path, overrides):
    short = ["training.steps=6", *overrides]
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, *short)
    first, second = train(two, file, *short, f"output={tmp_path / 'ranks'}")
    assert (first.code, first.errors) == (0, "")
    assert second[:3] == (0, "", "")
    assert weights(tmp_path / "ranks") == weights(tmp_path / "run")


def test_a_rank_may_have_nothing_to_train(two, tmp_path):
    file = tiny_run.write(tmp_path, model=own("with_frozen_image_tower"))
    overrides = ["training.steps=4", "pipeline.balance=[2, 5]", "training.clip_gradient_norm=0.1"]
    tiny_run.run(file, *overrides)
    assert [said.code for said in train(two, file, *overrides, f"output={tmp_path / 'ranks'}")] == [0, 0]
    assert weights(tmp_path / "ranks") == weights(tmp_path / "run")


def test_what_the_first_rank_shows(two, tmp_path, alone):
    first, _ = train(two, tiny_run.write(tmp_path), "pipeline.stages=3")
    lines = first.out.splitlines()
    assert "cells per stage: 3 on cpu (rank 0), 4 on cpu (rank 1), not pipeline.stages = 3; 12 steps" in lines[0]
    assert [line.split()[1] for line in lines[1:5]] == ["3/12", "6/12", "9/12", "12/12"]
    assert weights(tmp_path / "run") == alone
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"busy/stage_0", "busy/stage_1"} < tags
    assert {f"peak_memory_mebibytes/rank_{rank}_process" for rank in (0, 1)} < tags
    assert all(0 < point.value <= 1 for stage in (0, 1) for point in events.Scalars(f"busy/stage_{stage}"))
    trace = json.loads((tmp_path / "run" / "timeline.json").read_text())
    busy = {event["tid"] for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 0}
    assert len(busy) == 2


def test_a_run_goes_on_with_another_number_of_ranks(two, tmp_path):
    file = tiny_run.write(tmp_path)
    assert [said.code for said in train(two, file, CONSTANT, "training.steps=3")] == [0, 0]
    assert "at step 3" in tiny_run.run(file, CONSTANT, "training.steps=6", resume=True)
    first, _ = train(two, file, CONSTANT, "training.steps=9", resume=True)
    assert f"resuming {tmp_path / 'run'} at step 6" in first.out
    assert "warning" not in first.out
    tiny_run.run(file, CONSTANT, "training.steps=9", f"output={tmp_path / 'whole'}")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two, tmp_path, alone):
    file = tiny_run.write(tmp_path, loss={"factory": "test_cli_ranks.Loss"})
    first, second = train(two, file, AT_STEP="5", SIGNAL=str(int(signal.SIGTERM)))
    told = "SIGTERM: saved and stopped after step 5 of 12. To go on: the same command with --resume\n"
    assert (first.code, first.errors) == (143, told)
    assert second[:3] == (143, "", "")
    first, _ = train(two, file, resume=True)
    assert f"resuming {tmp_path / 'run'} at step 5" in first.out
    assert weights(tmp_path / "run") == alone


def test_started_again_a_job_goes_on_with_its_own_run(two, tmp_path, alone):
    file = tiny_run.write(tmp_path, loss={"factory": "test_cli_ranks.Loss"})
    train(two, file, AT_STEP="5", SIGNAL=str(int(signal.SIGINT)))
    first, second = train(two, file, TORCHELASTIC_RESTART_COUNT="1", TORCHELASTIC_RUN_ID="another job")
    assert (first.code, second.code) == (2, 2)
    assert "holds a run already; continue it with --resume" in first.errors
    first, _ = train(two, file, TORCHELASTIC_RESTART_COUNT="1")
    assert f"resuming {tmp_path / 'run'} at step 5" in first.out
    assert weights(tmp_path / "run") == alone


def test_started_again_before_there_was_a_run(two, tmp_path, alone):
    file = tiny_run.write(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.7.partial").touch()  # of a process killed as it claimed the folder
    first, _ = train(two, file, TORCHELASTIC_RESTART_COUNT="1")
    assert first.code == 0, first.errors
    assert weights(tmp_path / "run") == alone


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pipeline.stagse=3", "pipeline.stagse: unknown key, given 3; did you mean 'stages'?"),
        (
            "pipeline={stages: 3, balance: [1, 2, 4]}",
            "pipeline.balance: has 3 entries, one a stage, but 2 ranks make 2",
        ),
        ("pipeline.balance=[1, 1]", "pipeline: balance must sum to the number of cells"),
        ("training.batch_size=5000", "training.batch_size: should be at most"),
        ("optimizer={name: Muon, lr: 0.1}", "optimizer: Muon refuses the parameters"),
        ("output=.", "output: . is in use, but not by gpipe; choose another"),
        ("model.factory=test_cli_ranks.Bomb", "14 problems\n  model.arguments.image_size: unknown key"),
    ],
)
def test_what_is_refused_is_told_once(two, tmp_path, override, told):
    first, second = train(two, tiny_run.write(tmp_path), override)
    assert (first.code, second.code) == (2, 2)
    assert told in first.errors
    assert not first.errors.startswith("rank")
    assert (first.out, second.out, second.errors) == ("", "", "")
    assert max(first.seconds, second.seconds) < PROMPT


def test_what_one_rank_alone_refuses(two, tmp_path):
    file = str(tiny_run.write(tmp_path))
    first, second = two.values(command, [["train", file], ["train", "/nowhere.yaml"]], {})
    assert first[:3] == (2, "", "")
    assert second[:3] == (2, "", "rank 1: /nowhere.yaml: there is no such file\n")


def test_what_a_cell_raises_is_told_once_where_it_was_raised(two, tmp_path):
    first, second = train(two, tiny_run.write(tmp_path, model=own("with_bomb")), AT_STEP="3")
    assert (first.code, first.errors) == (1, "")
    assert second.code == 1
    assert second.errors.startswith("rank 1, stage 1: Traceback (most recent call last):")
    assert second.errors.count("ValueError: boom") == 1
    assert second.errors.endswith("cell 7 (Bomb), micro-batch 1, action 1F1\n")
    assert max(first.seconds, second.seconds) < PROMPT


def test_a_loss_that_is_no_number_ends_all_ranks(two, tmp_path):
    file = tiny_run.write(tmp_path, loss={"factory": "test_cli_ranks.Loss"})
    first, second = train(two, file, AT_STEP="6")
    assert (first.code, first.errors) == (1, "")
    assert second.code == 1
    newest = tmp_path / "run" / "saves" / "step-000000004"
    assert second.errors.startswith(
        f"rank 1, stage 1: step 6: the loss is nan; the newest save, {newest}, is from befo"
    )
    assert "lower optimizer.lr" in second.errors
    assert len(second.errors.splitlines()) == 1


def test_an_environment_that_describes_no_world(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    said = command(0, ["train", str(tiny_run.write(tmp_path))], {})
    assert said[:2] == (2, "")
    assert said.errors.startswith("environment: ")
    assert said.errors.endswith("; start ranks with torchrun, or unset WORLD_SIZE for a single process\n")


@pytest.mark.parametrize("name", ["eval", "plan", "simulate"])
def test_other_commands_take_one_process(two, tmp_path, name):
    first, second = gpipe(two, name, tiny_run.write(tmp_path))
    told = f"gpipe {name}: torchrun started 2 processes, but this takes one: start it without torchrun\n"
    assert first[:3] == (2, "", told)
    assert second[:3] == (2, "", "")


def warn(rank):
    with mock.patch.dict(os.environ, WORLD_SIZE="2"), joined(Console()) as world:
        world.stages = (rank,)
        return warnings.formatwarning("beware", UserWarning, "file.py", 3, "")


def test_warnings_say_which_rank_they_are_of(two):
    assert two.values(warn)[1].startswith("rank 1, stage 1: file.py:3: UserWarning: beware")


def odd_weights(rank):
    """Of every type a state may hold, some on both ranks."""
    types = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    own = {f"{rank}.{dtype}": torch.full((2, 3), rank + 1).to(dtype).T for dtype in types}
    return own | {f"{rank}.scalar": torch.tensor(7.0), f"{rank}.none": torch.ones(0), "both": torch.full((2,), rank)}


def gather(rank):
    return Ranks().whole(odd_weights(rank))


def test_weights_of_all_ranks_come_to_the_first(two):
    first, second = two.values(gather)
    assert second == {}
    expected = odd_weights(1) | odd_weights(0)
    assert first.keys() == expected.keys()
    for name, weight in expected.items():
        assert first[name].dtype == weight.dtype
        assert torch.equal(first[name], weight), name


def test_the_weights_of_the_loss_are_there(two, tmp_path):
    train(two, tiny_run.write(tmp_path), "training.steps=1")
    assert "logit_scale" in load_file(tmp_path / "run" / "weights.safetensors")
