"""The scripts of one question each, at a tiny size: every table, every sample and a figure are left."""

import json
import sys
from importlib import import_module

import pytest

from benchmarks import harness
from benchmarks.__main__ import HERE, questions
from benchmarks.harness import Samples

TIMED = {
    "overhead": ["--size", "tiny", "--rounds", "1", "--steps", "2"],
    "balance": ["--size", "tiny", "--rounds", "1", "--models", "U-Net"],
    "contrastive": ["--size", "tiny", "--rounds", "1"],
    "one_device": [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--device",
        "cpu",
        "--chunks",
        "2",
        "--models",
        "U-Net",
        "CLIP ViT",
    ],
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_wait_for_quiet", lambda: None)
    return tmp_path


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=() if name == "overhead" else pytest.mark.rare) for name in TIMED]
)
def test_a_script_leaves_table_samples_and_figure(results, monkeypatch, script):
    monkeypatch.setattr(sys, "orig_argv", ["/bin/python3", "-m", f"benchmarks.{script}", *TIMED[script]])
    import_module(f"benchmarks.{script}").main(TIMED[script])
    record = json.loads((results / f"{script}.json").read_text())
    assert record["machine"]["torch"]
    assert all(len(samples["seconds"]) == 1 for samples in record["samples"].values())
    assert all(len(row) == len(result["columns"]) for result in record["results"] for row in result["rows"])
    assert "</svg>" in (results / f"{script}.svg").read_text()
    assert (results / f"{script}.md").read_text().startswith(f"`python -m benchmarks.{script} --size tiny --rounds 1")
    assert record["command"].startswith(f"python -m benchmarks.{script} --size tiny --rounds 1")


def test_the_gradients_of_every_way_are_those_of_cached_features_to_the_bit():
    from benchmarks.contrastive import CACHED, SIZES, WHOLE, contenders, exactness

    rows = {row[0]: row for row in exactness(contenders(SIZES["tiny"])).rows}
    total = rows[CACHED][2].split(" of ")[1]
    assert all(row[2] == f"{total} of {total}" for name, row in rows.items() if name != WHOLE)
    assert all(float(row[1]) < 1e-4 for row in rows.values())


def test_the_profile_of_a_step_names_the_rooms_of_the_runtime():
    from benchmarks.overhead import SIZES, breakdown

    rooms = [row[0] for row in breakdown(SIZES[1], 2).rows]
    assert {"worker loop", "receive and send", "autograd door", "scatter and gather", "cells"} <= set(rooms)
    assert len(set(rooms)) == len(rooms)


def test_a_line_tells_what_is_spent_an_action_from_what_is_spent_once():
    from benchmarks.overhead import SIZES, fitted, steps

    samples = {}
    for size in SIZES[:3]:
        for way in steps(size):
            samples[f"{size}, {way}: plain"] = Samples([1.0], [0.0])
            samples[f"{size}, {way}: K=1"] = Samples([1.0 + 500e-6 + 2 * size.chunks * 50e-6], [0.0])
    assert [row[1:] for row in fitted(SIZES[:3], samples).rows] == [["50", "500"]] * 2


def test_the_simulation_of_scale_finds_slow_links_slow(results):
    from benchmarks import scale

    scale.main(["--devices", "16", "32", "--chunks", "32"])
    tables = {t["title"].split()[0]: t for t in json.loads((results / "scale.json").read_text())["results"]}
    speedups = [[float(cell.split()[0]) for cell in row[1:]] for row in tables["The"]["rows"]]
    assert all(data_centre >= metro >= internet for data_centre, metro, internet in speedups)
    assert all(speedup <= devices for devices, row in zip((16, 32), speedups, strict=True) for speedup in row)
    assert "</svg>" in (results / "scale.svg").read_text()


# The table of where pipelines stop paying wanted the largest of no speed-ups.
def test_the_simulation_of_scale_says_where_no_number_of_devices_fits(results):
    from benchmarks import scale

    scale.main(["--devices", "16", "--chunks", "32"])
    tables = {t["title"].split()[0]: t for t in json.loads((results / "scale.json").read_text())["results"]}
    assert [row[1:] for row in tables["Where"]["rows"]] == [["none fits", "none fits", "none"]] * 3
    assert "</svg>" in (results / "scale.svg").read_text()


def test_parameters_of_the_papers_tables_are_met():
    from benchmarks.paper_costs import PAPERS, parameters, tpu, transformer

    speed, _ = tpu()
    table = PAPERS["gpipe_table1_transformer"]
    for layers, printed in zip(table["layers"], table["params"], strict=True):
        assert parameters(transformer(layers, speed)) == pytest.approx(printed, rel=0.004)


def test_a_recompute_on_demand_is_never_faster_than_one_while_waiting():
    from benchmarks.paper_costs import tpu, transformer
    from benchmarks.paper_tables import throughput

    speed, link = tpu()
    costs = transformer(6, speed)
    for micro_batches in (1, 4):
        late, early = (throughput(costs, 2, micro_batches, link, on_demand=late) for late in (True, False))
        assert late < early
        assert early <= throughput(costs, 2, micro_batches, link, keep=micro_batches)


def test_every_script_says_which_question_it_answers_and_how_it_is_run():
    found = questions()
    scripts = [path.stem for path in HERE.glob("*.py") if "\nRun: python -m benchmarks." in path.read_text()]
    assert sorted(found) == sorted(scripts)
    assert all(question.endswith("?") for question, _ in found.values())
    assert all(command.startswith("python -m benchmarks.") for _, command in found.values())


def test_all_ways_on_one_device_compute_in_the_precision_asked_for(monkeypatch):
    import torch

    from benchmarks.models import NETS
    from benchmarks.one_device import WAYS, Setting

    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.append((y := linear(*a)).dtype) or y)
    for dtype in (torch.float32, torch.bfloat16):
        setting = Setting(NETS["tiny"]["ResNet-50"], 2, torch.device("cpu"), dtype)
        for way, make in WAYS.items():
            if not way.startswith("torchgpipe"):
                step = make(setting)
                seen.clear()
                step()
                assert set(seen) == {dtype}, way


def test_a_way_that_fails_on_one_device_is_named(results, monkeypatch):
    from benchmarks import one_device

    def fail(setting):
        raise AttributeError("no such thing\nin this torch")

    monkeypatch.setitem(one_device.WAYS, "GPipe K=1", fail)
    one_device.main([*TIMED["one_device"][:-1], "--precision", "float32", "--name", "other"])
    (table,) = json.loads((results / "other.json").read_text())["results"]
    rows = {row[0]: row for row in table["rows"]}
    assert rows["GPipe K=1"][1:3] == ["failed", "AttributeError: no such thing"]
    assert float(rows["GPipe K=2"][3]) > 0
