"""The command ``gpipe simulate``, and schedules and timelines in ``gpipe train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from gpipe.training.cli import app

DEVICES = ("--devices", "4xH100")


def run(command: str, *arguments: object) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": "160"})
    finally:
        torch.set_num_threads(threads)


def test_the_table_and_the_pictures(tmp_path: Path) -> None:
    result = run("simulate", tiny_run.write(tmp_path), "--stages", 2, "--chunks", 4, *DEVICES)
    assert result.exit_code == 0, result.output
    for name in ("gpipe", "gpipe_zero_bubble", "one_f_one_b", "zero_bubble_h1", "interleaved_one_f_one_b"):
        assert f" {name} " in result.stdout
        assert f"\n{name}\nworker 0 |" in result.stdout
    assert "samples/s" in result.stdout


def test_as_json_and_one_schedule(tmp_path: Path) -> None:
    result = run(
        "simulate",
        tiny_run.write(tmp_path),
        "--schedule",
        "zero_bubble_h1",
        "--stages",
        2,
        "--chunks",
        4,
        "--json",
        *DEVICES,
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (one,) = found["schedules"]
    assert one["name"] == "zero_bubble_h1"
    assert one["seconds"] > 0
    assert len(one["peak_bytes"]) == len(found["balance"]) == 2


def test_this_machine_is_measured(tmp_path: Path) -> None:
    result = run("simulate", tiny_run.write(tmp_path), "--schedule", "gpipe", "--stages", 2, "--chunks", 2)
    assert result.exit_code == 0, result.output
    assert "measuring" in result.stderr


def test_a_schedule_that_cannot_be_says_why(tmp_path: Path) -> None:
    result = run("simulate", tiny_run.write(tmp_path), "--stages", 3, "--chunks", 2, *DEVICES)
    assert "interleaved_one_f_one_b: stages must be a multiple of stages_per_worker, got 3" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--schedule", "gpip", *DEVICES], "--schedule: schedule must be one of 'gpipe'"),
        (["--stages", "99", "--devices", "100xH100"], "--stages: expected at most"),
        (["--stages", "5", *DEVICES], "--devices: expected at least 5, one a stage, given 4"),
        (["--set", "pipeline.schedule=gpip"], "pipeline.schedule"),
        (["--set", "pipeline.schedule=one_f_one_b"], "it needs loss_over: micro_batch"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = run("simulate", tiny_run.write(tmp_path), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert problem in result.stderr.replace("\n", " ")


def test_a_run_leaves_its_timeline(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    result = run("train", file, "--set", f"output={tmp_path / 'run'}", "--set", "pipeline.stages=2")
    assert result.exit_code == 0, result.output
    trace = json.loads((tmp_path / "run" / "timeline.json").read_text())
    assert {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"} >= {"0F0", "1F0", "1B0", "0B0"}
    assert "timeline.json" in result.stdout


def test_flushes_train_to_the_same_bits(tmp_path: Path) -> None:
    found = []
    for schedule in ("gpipe", "gpipe_zero_bubble"):
        folder = tmp_path / schedule
        file = tiny_run.write(tmp_path)
        options = ("--set", f"output={folder}", "--set", f"pipeline.schedule={schedule}", "--set", "pipeline.stages=2")
        assert run("train", file, *options).exit_code == 0
        found.append(load_file(folder / "weights.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
