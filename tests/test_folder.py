from pathlib import Path

import pytest
import tiny_run

from gpipe.training.errors import ConfigurationError


def test_steps_may_grow(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, "training.steps=5")
    printed = tiny_run.run(file, resume=True)
    assert "warning: training.steps was 5 and is 12: the learning rate" in printed
    with pytest.raises(ConfigurationError, match=r"training.steps: may grow but not shrink: 12 in the run, 5 now"):
        tiny_run.run(file, "training.steps=5", resume=True)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=1", "optimizer.lr: 0.01 in the run, 1 now"),
        ("pipeline.chunks=1", "pipeline.chunks: 3 in the run, 1 now"),
        ("pipeline.threads=2", "pipeline.threads: 1 in the run, 2 now"),
        ("optimizer.eps=1", "optimizer.eps: null in the run, 1 now"),
        ("model.arguments.dropout=0.0", "model.arguments.dropout: 0.1 in the run, 0.0 now"),
        ("data.augment=", "data.augment: null in the run"),
    ],
)
def test_resuming_with_other_bits_is_refused(tmp_path: Path, override: str, told: str) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, "training.steps=1")
    with pytest.raises(ConfigurationError, match=r"cannot resume .*run, which was trained otherwise") as caught:
        tiny_run.run(file, "training.steps=1", override, resume=True)
    if override.startswith("data"):
        told = "data.augment.degrees: 15.0 in the run, null now"
    assert told in str(caught.value)


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, "training.steps=1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=r"output: .*run holds a run already; continue it with --resume"):
        tiny_run.run(file)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigurationError, match=r"output: .*run is in use, but not by gpipe; choose another"):
        tiny_run.run(tiny_run.write(tmp_path), resume=resume)
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"output: .*file/run cannot be "):
        tiny_run.run(tiny_run.write(tmp_path), f"output={tmp_path / 'file' / 'run'}")


def test_what_killed_processes_left_half_written_goes(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    left = [folder / f".{name}.12345.partial" for name in ("config.yaml", "weights.safetensors", "timeline.json")]
    others = folder / ".eval.json.12345.partial"  # gpipe eval may be writing it
    for path in (*left, others):
        path.write_text("half")
    tiny_run.run(file, "training.steps=1")
    assert not any(path.exists() for path in left)
    assert others.exists()
