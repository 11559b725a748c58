"""Saves in one process: what is in them, whole or not there, damage recognised."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from disks import room_for
from nets import assert_same, linears, make_pipe
from torch import nn

from gpipe import Restored, Saves
from gpipe.saving.save_folder import summed
from gpipe.saving.tensor_files import read_metadata

ROOT = Path(__file__).parent.parent


def no_warning(message):
    raise AssertionError(message)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(value, cells=2):
    module = linears(cells)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def value_of(module):
    (value,) = {float(v) for p in module.parameters() for v in p.detach().flatten()}
    return value


# --- what is in it ----------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """Entries of every kind that a state may have."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), 1.0 + start).t())
        self.frozen = nn.Parameter(torch.full((2,), 2.0 + start), requires_grad=False)
        self.low = nn.Parameter(torch.full((5,), 0.3 + start, dtype=torch.bfloat16))
        self.tied = self.low
        self.register_buffer("count", torch.tensor(3 + int(start)))
        self.register_buffer("none", torch.zeros(0, 4))
        self.register_buffer("view", torch.arange(20.0).reshape(4, 5)[1:3, ::2] + start)
        self.register_buffer("mask", torch.tensor([True, start == 0]))
        self.register_buffer("absent", None)
        self.register_buffer("wave", torch.tensor([1 + 2j, start]))
        self.extra = (start, {"seen": [1, None, "text"], "at": torch.tensor([start])})

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_every_kind_of_entry_comes_back(tmp_path):
    first, second = Everything(), Everything(4.0)
    Saves(tmp_path).write(1, first)
    assert Saves(tmp_path).read(second) == Restored(1, {}, tmp_path / "step-000000001")
    state = {key: value for key, value in first.state_dict().items() if key != "_extra_state"}
    assert_same({key: value for key, value in second.state_dict().items() if key != "_extra_state"}, state)
    assert second.tied is second.low
    start, rest = second.extra
    assert (start, rest["seen"], rest["at"]) == (0.0, [1, None, "text"], torch.tensor([0.0]))


def test_torch_reads_the_tensors_by_the_modules_names(tmp_path):
    module = filled(2.0)
    optimizer = stepped(torch.optim.Adam, module)
    path = Saves(tmp_path).write(5, module, optimizer)
    state = filled(0.0).state_dict()
    with pytest.warns(UserWarning, match="single process"):
        dcp.load({"model": state}, checkpoint_id=path)
    assert_same(state, module.state_dict())
    keys = dcp.FileSystemReader(path).read_metadata().state_dict_metadata.keys()
    assert {key for key in keys if key.startswith("model")} == {f"model.{name}" for name in module.state_dict()}
    assert "optimizer.state.1.weight.exp_avg_sq" in keys


def stepped(make, module, steps=3, **options):
    """An optimizer after a few steps."""
    optimizer = make(module.parameters(), **options)
    step_on(module, optimizer, steps)
    return optimizer


def step_on(module, optimizer, steps=1):
    for _ in range(steps):

        def closure():
            optimizer.zero_grad()
            loss = (module(torch.linspace(-1, 1, 8).reshape(2, 4)) - 3).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {"lr": 0.01}),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}),
        (torch.optim.AdamW, {"amsgrad": True, "betas": (0.5, 0.6)}),
        (torch.optim.AdamW, {"lr": torch.tensor(0.01), "capturable": False, "foreach": False}),
        (torch.optim.Adafactor, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.ASGD, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.LBFGS, {"max_iter": 3}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else ",".join(value),
)
def test_every_optimizer_goes_on_to_the_same_bits(tmp_path, make, options):
    module = linears()
    module[0].bias.requires_grad_(False)
    optimizer = stepped(make, module, **options)
    Saves(tmp_path).write(3, make_pipe(module, [1, 2]), optimizer)

    torch.manual_seed(9)
    other = linears()
    other[0].bias.requires_grad_(False)
    read = make(other.parameters(), **{**options, "lr": 0.5})
    Saves(tmp_path).read(other, read)
    for group, found in zip(optimizer.param_groups, read.param_groups, strict=True):
        assert {k: v for k, v in found.items() if k != "params"} == {k: v for k, v in group.items() if k != "params"}
        assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in group.items()}
    step_on(module, optimizer, 2)
    step_on(other, read, 2)
    assert_same(other.state_dict(), module.state_dict())


def test_groups_may_be_ordered_otherwise_and_be_empty(tmp_path):
    module = filled(1.0, 3)
    optimizer = torch.optim.SGD(
        [
            {"params": module[0].parameters(), "lr": 0.1, "momentum": 0.5},
            {"params": [*module[1].parameters(), *module[2].parameters()], "lr": 0.2},
            {"params": [], "lr": 0.3},
        ]
    )
    step_on(module, optimizer)
    Saves(tmp_path).write(1, module, optimizer)
    other = linears()
    read = torch.optim.SGD(
        [
            {"params": [*module_parts(other, 1, 2)]},
            {"params": []},
            {"params": []},
            {"params": [*module_parts(other, 0)][::-1]},
            {"params": [], "lr": 7.0},
        ],
        lr=9.0,
    )
    Saves(tmp_path).read(other, read)
    # group 1 is empty here and group 1 was not then: its options are those; there was no group 4
    assert [group["lr"] for group in read.param_groups] == [0.2, 0.2, 0.3, 0.1, 7.0]
    assert_same(read.state[other[0].weight], optimizer.state[module[0].weight])
    assert_same(read.state[other[0].bias], optimizer.state[module[0].bias])


def module_parts(module, *indices):
    return [p for i in indices for p in module[i].parameters()]


def test_names_that_an_optimizer_keeps_are_its_own(tmp_path):
    module = linears()
    Saves(tmp_path).write(1, module, torch.optim.Adam(module.named_parameters()))
    optimizer = torch.optim.Adam(module.named_parameters(prefix="mine"))
    Saves(tmp_path).read(module, optimizer)
    assert optimizer.param_groups[0]["param_names"][0] == "mine.0.weight"


def test_extra_comes_back(tmp_path):
    extra = {"step": 3, "loss": 0.1 + 0.2, "name": "ä", "list": [1, None, {"a": True}]}
    Saves(tmp_path).write(1, linears(), extra=extra)
    assert Saves(tmp_path).read(linears()).extra == extra


# --- whole or not there -----------------------------------------------------------------------------------------------


def test_no_save(tmp_path):
    assert Saves(tmp_path / "none").read(linears()) is None
    assert not (tmp_path / "none").exists()


def test_the_newest_are_kept_and_the_last_written_is_read(tmp_path):
    saves = Saves(str(tmp_path), keep=3)
    for step in (5, 10, 1000, 10**9 + 1):
        assert saves.write(step, filled(step)).name == f"step-{step:09d}"
    assert names(tmp_path) == ["latest", "step-000000010", "step-000001000", "step-1000000001"]
    assert (tmp_path / "latest").read_text() == "step-1000000001\n"
    module = linears(2)
    assert saves.read(module).step == 10**9 + 1


def test_saves_of_an_abandoned_future_go(tmp_path):
    saves = Saves(tmp_path)
    for step in (10, 15, 12):
        saves.write(step, filled(step))
    assert names(tmp_path) == ["latest", "step-000000010", "step-000000012"]


def test_a_save_of_the_same_step_is_replaced(tmp_path):
    saves = Saves(tmp_path)
    for value in (1.0, 2.0):
        saves.write(4, filled(value))
    module = linears(2)
    saves.read(module)
    assert value_of(module) == 2.0
    assert names(tmp_path) == ["latest", "step-000000004"]


def test_leftovers_of_a_killed_run_go(tmp_path):
    for name in (".step-000000004.partial", ".step-000000002.replaced", ".step-000000001.gone.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    Saves(tmp_path).write(4, linears())
    assert names(tmp_path) == ["latest", "step-000000004"]


def test_what_a_save_sweeps_is_its_own(tmp_path):
    others = [".mine.partial", ".eval.json.1.partial", "step-000000001", "step-000000009"]
    for name in others:
        (tmp_path / name).mkdir()
    Saves(tmp_path, keep=1).write(4, linears())
    assert names(tmp_path) == sorted(["latest", "step-000000004", *others])


def test_a_change_of_the_working_directory_moves_no_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saves = Saves("here")
    assert saves.folder == tmp_path / "here"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert saves.write(1, linears()) == tmp_path / "here" / "step-000000001"


def write_and_die(folder, step, value, after):
    """Write a save, but be killed at one of the moments when something changes on the disk."""
    calls = 0

    def dying(call):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == after:
                os.kill(os.getpid(), 9)
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "rename", "replace", "rmdir", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    Saves(folder, keep=1).write(step, filled(value))


def die_at_every_moment(folder, step):
    """In a copy of the save for each; the last one lives."""
    for after in range(1, 100):
        copy = folder / f"{after:02d}"
        shutil.copytree(folder / "first", copy)
        if (child := os.fork()) == 0:
            write_and_die(copy, step, 2.0, after)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


@pytest.mark.parametrize("step", [1, 2])
def test_killed_at_any_moment_it_leaves_a_whole_save(tmp_path, step):
    """Step 1 takes the place of the save that is there, step 2 follows it."""
    Saves(tmp_path / "first").write(1, filled(1.0))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed", "gpipe.distributed", "nets"])
    process = context.Process(target=die_at_every_moment, args=(tmp_path, step))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = []
    for folder in sorted(tmp_path.glob("[0-9]*")):
        module = linears(2)
        restored = Saves(folder).read(module, warn=no_warning)
        found.append(value_of(module))
        assert restored.step == (step if found[-1] == 2.0 else 1)
        Saves(folder, keep=1).write(3, filled(3.0))
        assert names(folder) == ["latest", "step-000000003"]
    assert len(found) > 8
    assert found == sorted(found)  # once it is there, it stays
    assert (found[0], found[-1]) == (1.0, 2.0)


def test_a_full_disk_costs_no_earlier_save(tmp_path):
    saves = Saves(tmp_path)
    saves.write(5, filled(5.0))
    message = r"step-000000010 cannot be written: .*File too large; the saves before it are as they were"
    with room_for(100_000), pytest.raises(OSError, match=message):
        saves.write(10, nn.Linear(1000, 1000))
    assert names(tmp_path) == ["latest", "step-000000005"]
    assert saves.read(linears(2), warn=no_warning).step == 5


def test_files_reach_the_disk_before_their_names(tmp_path, monkeypatch):
    calls = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def where(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(where(fd)).name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename to {Path(b).name}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"replace {Path(b).name}"), replace(a, b)))
    Saves(tmp_path).write(1, linears())
    end = calls.index("rename to step-000000001")
    assert {"__0_0.distcp", ".metadata", "save.json"} <= set(calls[:end])
    assert calls[end - 1] == ".step-000000001.partial"
    assert calls[end + 1] == tmp_path.name
    assert "replace latest" in calls[end + 1 :]


# --- damage -----------------------------------------------------------------------------------------------------------


def flip_a_bit(path):
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "__0_0.distcp").write_bytes(content)


def cut_off(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def no_tensors(path):
    (path / "__0_0.distcp").unlink()


def no_metadata(path):
    (path / ".metadata").unlink()


def no_json(path):
    (path / "save.json").write_text("{")


def no_text(path):
    (path / "save.json").write_bytes(b"\xff\xfe")


def no_content(path):
    (path / "save.json").unlink()


def other_json(path):
    (path / "save.json").write_text("[1]")


def another_extra(path):
    text = (path / "save.json").read_text()
    (path / "save.json").write_text(text.replace('"kept": 1', '"kept": 2'))


def another_format(path):
    text = (path / "save.json").read_text()
    (path / "save.json").write_text(text.replace('"format": 1', '"format": 2'))


def of_torch_alone(path):
    shutil.rmtree(path)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": linears().state_dict()}, checkpoint_id=path)


def renamed(path):
    content = path.with_name("step-000000005")
    shutil.rmtree(path)
    shutil.copytree(content, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, "__0_0.distcp: wrong checksum"),
        (cut_off, r"__0_0.distcp has \d+ bytes, not \d+"),
        (no_tensors, "No such file.*__0_0.distcp"),
        (no_metadata, "No such file.*.metadata"),
        (no_json, "save.json is no JSON"),
        (no_text, "save.json is no JSON"),
        (no_content, "No such file.*save.json"),
        (other_json, "save.json is not that of a save"),
        (another_extra, "save.json: wrong checksum"),
        (another_format, "format 2; this version of gpipe reads format 1"),
        (of_torch_alone, "No such file.*save.json"),
        (renamed, "it is the save of step 5"),
    ],
)
def test_a_damaged_save_is_passed_over(tmp_path, damage, reason):
    saves = Saves(tmp_path)
    for step in (5, 10):
        path = saves.write(step, filled(step), extra={"kept": 1})
    damage(path)
    module, told = linears(2), []
    assert saves.read(module, warn=told.append).step == 5
    assert value_of(module) == 5.0
    (message,) = told
    assert message.startswith(f"{path} is damaged (")
    with pytest.raises(RuntimeError, match=reason):
        raise RuntimeError(message)


def test_nothing_but_damaged_saves(tmp_path):
    saves = Saves(tmp_path)
    for step in (5, 10):
        flip_a_bit(saves.write(step, linears()))
    module = filled(3.0)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(RuntimeError, match=r"none of the 2 saves in .* \(the latest: __0_0.distcp: wrong checksum\)"),
    ):
        saves.read(module)
    assert value_of(module) == 3.0


@pytest.mark.parametrize("text", [None, b"", b"step-000000003\n", b"../../etc", b"\xff\xfe\x00"])
def test_latest_missing_or_garbage(tmp_path, text):
    saves = Saves(tmp_path)
    for step in (5, 10):
        saves.write(step, linears())
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_bytes(text)
    told = []
    assert saves.read(linears(), warn=told.append).step == 10
    assert len(told) == (text is not None)
    assert all("taking the newest save" in message for message in told)


def test_latest_goes_before_newer(tmp_path):
    saves = Saves(tmp_path)
    for step in (5, 10):
        saves.write(step, linears())
    (tmp_path / "latest").write_text("step-000000005\n")
    assert saves.read(linears(), warn=no_warning).step == 5


def test_other_things_in_the_folder_are_let_be(tmp_path):
    for name in ("step-x", "step-5", "notes", "step-000000001.pt"):
        (tmp_path / name).mkdir()
    assert Saves(tmp_path).read(linears(), warn=no_warning) is None
    Saves(tmp_path).write(7, linears())
    assert names(tmp_path) == ["latest", "notes", "step-000000001.pt", "step-000000007", "step-5", "step-x"]


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def signed(path):
    """Give a save that someone changed the checksums it should have."""
    from gpipe.saving.save_folder import _own_checksum

    content = json.loads((path / "save.json").read_text())
    del content["crc32"]
    content["files"] = summed(path / name for name in content["files"])
    (path / "save.json").write_text(json.dumps({**content, "crc32": _own_checksum(content)}))


def test_a_pickle_in_a_save_runs_nothing(tmp_path):
    path = Saves(tmp_path).write(1, linears())
    (path / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    signed(path)
    told = []
    with pytest.raises(RuntimeError, match="none of the 1 saves"):
        Saves(tmp_path).read(linears(), warn=told.append)
    assert "it asks for" in told[0]
    assert "mkdir, which is no part" in told[0]
    assert not (tmp_path / "touched").exists()


def test_an_entry_that_is_no_tensor_runs_nothing(tmp_path):
    """DCP reads such an entry with a pickle that may run anything."""
    path = Saves(tmp_path).write(1, linears())
    entries = {f"model.{name}": value for name, value in linears().state_dict().items()}
    with pytest.warns(UserWarning, match="overwriting|single process"):
        dcp.save({**entries, "model.x": Touch(tmp_path / "touched")}, checkpoint_id=path)
    signed(path)
    told = []
    with pytest.raises(RuntimeError, match="none of the 1 saves"):
        Saves(tmp_path).read(linears(), warn=told.append)
    assert "'model.x' is no tensor" in told[0]
    assert not (tmp_path / "touched").exists()


def test_tensors_elsewhere_are_no_part_of_a_save(tmp_path):
    path = Saves(tmp_path).write(1, linears())
    with pytest.raises(ValueError, match=r"is in '__0_0.distcp', which is no file of this save"):
        read_metadata(path, [".metadata"])


_CHANGE = (
    b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n"
    b"N}X\x07\x00\x00\x00changedK\x01s\x86b."  # build, on the class itself
)


def test_a_pickle_changes_no_class(tmp_path):
    (tmp_path / ".metadata").write_bytes(_CHANGE)
    assert pickle.loads(_CHANGE).changed == 1  # it would
    del dcp.metadata.Metadata.changed
    with pytest.raises(ValueError, match="does not describe the tensors of a save"):
        read_metadata(tmp_path, [])
    assert not hasattr(dcp.metadata.Metadata, "changed")


def test_a_description_that_is_none(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match="does not describe the tensors of a save: it holds a dict"):
        read_metadata(tmp_path, [])


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(saves, message, module, optimizer=None, **options):
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        saves.read(module, optimizer, **options)
    assert_same(module.state_dict(), before)
    assert optimizer is None or not optimizer.state


def test_a_save_of_something_else_is_refused(tmp_path):
    saves = Saves(tmp_path)
    module = filled(1.0)
    saves.write(1, module, stepped(torch.optim.Adam, module))
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    refused(
        saves, r"step-000000001 cannot be read here: it is of another module: it lacks '2.bias', '2.weight'", linears(3)
    )
    refused(saves, r"it lacks '2.bias', '2.weight', '3.bias' and 3 more: build", linears(5))
    refused(saves, r"the module here has no '1.bias', '1.weight': build", linears(1))
    refused(
        saves, r"model.0.weight is float32 of shape \(4, 4\) in it, but float32 of shape \(5, 5\) here", linears(2, 5)
    )
    refused(saves, r"model.0.weight is float32 .* but bfloat16 .* here: .* cast it after", linears(2).bfloat16())
    other = linears(2)
    refused(saves, "it holds the state of Adam, but the optimizer given is SGD", other, sgd(other.parameters()))
    refused(saves, "the optimizer here has no '1.bias', '1.weight'", other, adam(other[0].parameters()))
    refused(saves, r"parameter 1 of the optimizer's group 0, of shape \(1,\), belongs neither", other,
            adam([other[0].bias, nn.Parameter(torch.ones(1))]))  # fmt: skip
    saves.write(2, filled(1.0))
    refused(saves, "written without an optimizer", other, adam(other.parameters()))


def test_groups_that_had_other_options_are_refused(tmp_path):
    module = linears(2)
    groups = [{"params": module[0].parameters(), "lr": 1.0}, {"params": module[1].parameters(), "lr": 2.0}]
    Saves(tmp_path).write(1, module, torch.optim.Adam(groups))
    message = "group 0 holds '0.weight' and '1.weight', which had different options"
    refused(Saves(tmp_path), message, module, torch.optim.Adam(module.parameters()))


class Odd(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return self.state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1, 2}, "model._extra_state is a set, but a save holds tensors"),
        ({1: 2}, "model._extra_state is a dict"),
        ([torch.float32], r"model._extra_state.0 is a dtype"),
        (torch.ones(2, device="meta"), "a tensor on the meta device"),
        (torch.ones(2).to_sparse(), "a Tensor of torch.sparse_coo"),
    ],
)
def test_what_no_save_can_hold_is_refused(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        Saves(tmp_path).write(1, Odd(state))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, linears()), ValueError, "step must be a whole number of at least 0, got -1"),
        ((1.0, linears()), ValueError, "step must be .* got 1.0"),
        ((1, {}), TypeError, "module must be an nn.Module, got dict"),
        ((1, linears(), {}), TypeError, "optimizer must be .* got dict"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        Saves(tmp_path).write(*arguments)
    assert names(tmp_path) == []


@pytest.mark.parametrize("extra", [{"a": (1,)}, {1: 2}, {"a": float("nan")}, {"a": torch.ones(1)}])
def test_extra_that_is_no_json(tmp_path, extra):
    with pytest.raises(TypeError, match="extra must be JSON"):
        Saves(tmp_path).write(1, linears(), extra=extra)


@pytest.mark.parametrize("keep", [0, True, 1.0])
def test_keep_is_a_count(tmp_path, keep):
    with pytest.raises(ValueError, match="keep must be a whole number of at least 1"):
        Saves(tmp_path, keep=keep)


@pytest.mark.parametrize("where", ["module", "loss", "optimizer"])
def test_nothing_is_left_half_loaded(tmp_path, where):
    module, loss = Everything(), linears(1)
    loss_weights = [*loss.parameters()]
    optimizer = torch.optim.Adam([module.weight, *loss_weights])
    (module.weight.sum() + loss_weights[0].sum()).backward()
    optimizer.step()
    Saves(tmp_path).write(1, module, optimizer, loss_fn=loss)
    before = {key: value for key, value in module.state_dict().items() if key != "_extra_state"}
    with torch.no_grad():
        module.weight += 1
        loss_weights[0].fill_(5)
    module.extra = 9
    optimizer.param_groups[0]["lr"] = 7.0
    before = {key: value.clone() for key, value in module.state_dict().items() if key != "_extra_state"}
    moment = optimizer.state[module.weight]["exp_avg"]

    def fail(*_):
        raise RuntimeError("no")

    register = {
        "module": lambda: module.register_load_state_dict_post_hook(fail),
        "loss": lambda: loss.register_load_state_dict_post_hook(fail),
        "optimizer": lambda: optimizer.register_load_state_dict_post_hook(fail),
    }[where]
    if where == "module":
        module.get_extra_state = lambda: torch.tensor(0.0)  # without, undoing need not load
    hook = register()
    with pytest.raises(RuntimeError, match="no"):
        Saves(tmp_path).read(module, optimizer, loss_fn=loss)
    hook.remove()
    assert_same({key: value for key, value in module.state_dict().items() if key != "_extra_state"}, before)
    assert (loss_weights[0] == 5).all()
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert optimizer.state[module.weight]["exp_avg"] is moment


# --- behind training's back -------------------------------------------------------------------------------------------


def test_an_error_behind_is_told_to_whoever_comes_next(tmp_path, monkeypatch):
    saves = Saves(tmp_path)
    saves.write(1, filled(1.0))
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.close(-1))
    for next_call in (saves.wait, lambda: saves.read(linears(2)), lambda: saves.write(3, linears(2))):
        saves.write(2, linears(2), wait=False)
        with pytest.raises(
            OSError, match=r"step-000000002 cannot be written: .*; the saves before it are as they were"
        ):
            next_call()
    saves.wait()
    assert names(tmp_path) == ["latest", "step-000000001"]


def test_one_save_at_a_time(tmp_path, monkeypatch):
    held, entered = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor):
        entered.set()
        held.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    saves = Saves(tmp_path)
    module = filled(1.0)
    saves.write(1, module, wait=False)
    assert entered.wait(10)
    assert Saves(tmp_path).read(linears(2)) is None
    with torch.no_grad():
        module[0].weight.fill_(4)
    threading.Timer(0.1, held.set).start()
    saves.write(2, filled(2.0), wait=False)
    assert (tmp_path / "step-000000001").exists()
    saves.wait()
    assert names(tmp_path) == ["latest", "step-000000001", "step-000000002"]
    shutil.rmtree(tmp_path / "step-000000002")
    (tmp_path / "latest").unlink()
    Saves(tmp_path).read(module)
    assert value_of(module) == 1.0


def program(text, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", text, str(folder)], capture_output=True, text=True, env=environment, check=False
    )


_PROGRAM = """
import os, sys, time
from torch import nn
from gpipe import Saves

fsync = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.1), {0})
Saves(sys.argv[1]).write(1, nn.Linear(2, 2), wait=False)
"""


def test_the_end_of_the_program_waits_for_the_save(tmp_path):
    ended = program(_PROGRAM.format("fsync(descriptor)"), tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert Saves(tmp_path).read(nn.Linear(2, 2)).step == 1


def test_the_end_of_the_program_tells_of_a_failure(tmp_path):
    ended = program(_PROGRAM.format("1 / 0 if 0 else os.close(-1)"), tmp_path)
    assert "gpipe: a save begun with wait=False failed: " in ended.stderr
    assert "step-000000001 cannot be written" in ended.stderr
