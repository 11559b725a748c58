"""The scripts run at a tiny size, and leave table, samples and figure."""

import json
from importlib import import_module

import pytest

from benchmarks import harness, peers

DOORS = ("GPipe gpipe", "DistributedGPipe", "torch Schedule")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "_wait_for_quiet", lambda: None)
    monkeypatch.setitem(peers.PACKAGES, "fairscale", "no_such_package")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "model", "options"),
    [
        ("throughput", "U-Net", ["--rounds", "1"]),
        pytest.param("memory", "Transformer", [], marks=pytest.mark.rare),
        pytest.param("equal_memory", "Transformer", ["--rounds", "1", "--share", "1"], marks=pytest.mark.rare),
    ],
)
def test_the_script_leaves_table_samples_and_figure(results, script, model, options):
    import_module(f"benchmarks.{script}").main([*options, "--size", "tiny", "--chunks", "2", "--models", model])
    text = (results / f"{script}.md").read_text()
    assert all(f"| {door}" in text for door in DOORS)
    assert "Not installed: fairscale (ModuleNotFoundError: No module named 'no_such_package')" in text
    record = json.loads((results / f"{script}.json").read_text())
    assert record["machine"]["torch"]
    if script != "memory":  # it counts, and times nothing
        assert all(any(door in name for name in record["samples"]) for door in DOORS)
        assert all(len(s["seconds"]) == 1 for s in record["samples"].values())
    assert "</svg>" in (results / f"{script}.svg").read_text()


@pytest.mark.rare
def test_the_largest_model_fits_and_more_stages_hold_more():
    from benchmarks.largest import FAMILIES, largest_models

    (result,) = largest_models("tiny")
    sizes = [int(row[1]) for row in result.rows]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)
    measured = [float(row[4]) for row in result.rows]
    assert max(measured) * 2**20 <= FAMILIES["tiny"][0].cap


@pytest.mark.parametrize("script", ["throughput", "memory", "equal_memory"])
def test_the_script_says_which_question_it_answers(script):
    assert import_module(f"benchmarks.{script}").QUESTION.endswith("?")


def test_against_without_ranks_is_refused(capsys):
    with pytest.raises(SystemExit):
        import_module("benchmarks.throughput").main(["--against", "torch"])
    assert "give --engine distributed too" in capsys.readouterr().err
