import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_run
from filelock import FileLock

from gpipe.training.errors import ConfigurationError

ROOT = Path(__file__).parent.parent

HOLD = """
import sys
from pathlib import Path
from gpipe.training.folder import RunFolder
from gpipe.training.reading import read_configuration

configuration = read_configuration(Path(sys.argv[1]), ["training.steps=1"])
folder = RunFolder(configuration.output)
folder.check(configuration, sys.argv[1], resume=True)
print("held", flush=True)
sys.stdin.read()
"""
HELD = r"output: .*run is being written by another gpipe train: wait for it to end, or choose another folder: --set"


@contextmanager
def held_by_another(file: Path) -> Iterator[None]:
    """Have another process be at work in the output folder, and then die by SIGKILL."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.kill()


def test_two_runs_never_write_to_one_folder(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    for again in (False, True):  # the second time a run is there, and this process wrote it
        with held_by_another(file):
            for resume in (False, True):
                with pytest.raises(ConfigurationError, match=HELD):
                    tiny_run.run(file, "training.steps=1", resume=resume)
        tiny_run.run(file, "training.steps=1", resume=again)


def test_who_was_refused_holds_nothing(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, "training.steps=1")
    with pytest.raises(ConfigurationError, match=r"holds a run already") as kept:
        tiny_run.run(file)
    tiny_run.run(file, "training.steps=1", resume=True)
    assert kept.tb is not None, "in it the objects of the refused run live on"


def test_a_run_that_came_and_went_before_the_lock_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, "training.steps=1", f"output={tmp_path / 'other'}")
    acquire = FileLock.acquire

    def late(lock: FileLock, **options: bool) -> object:
        shutil.copytree(tmp_path / "other", tmp_path / "run", dirs_exist_ok=True)
        return acquire(lock, **options)

    monkeypatch.setattr(FileLock, "acquire", late)
    with pytest.raises(ConfigurationError, match=r"output: .*run holds a run already"):
        tiny_run.run(file)


def test_steps_may_grow(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file, "training.steps=5")
    printed = tiny_run.run(file, resume=True)
    assert "warning: training.steps was 5 and is 12: the learning rate" in printed
    with pytest.raises(ConfigurationError, match=r"training.steps: may grow but not shrink: 12 in the run, 5 now"):
        tiny_run.run(file, "training.steps=5", resume=True)


def test_what_a_shorter_run_gave_is_kept_beside_the_longer_one(tmp_path: Path) -> None:
    file, folder = tiny_run.write(tmp_path), tmp_path / "run"

    def found() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for name in ("weights*", "eval*") for path in folder.glob(name)}

    tiny_run.run(file, "training.steps=5")
    (folder / "eval.json").write_text("of step 5")
    ended = found()
    assert ended.keys() == {"weights.safetensors", "eval.json"}
    tiny_run.run(file, "training.steps=5", resume=True)
    assert found() == ended, "nothing was left to do"
    tiny_run.run(file, resume=True)
    after = found()
    assert after.pop("weights.safetensors") != ended["weights.safetensors"]
    assert after == {
        "weights-step-000000005.safetensors": ended["weights.safetensors"],
        "eval-step-000000005.json": ended["eval.json"],
    }


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
    left = [
        folder / f".{name}.12345.partial"
        for name in ("config.yaml", "data.txt", "weights.safetensors", "timeline.json")
    ]
    others = folder / ".eval.json.12345.partial"  # gpipe eval may be writing it
    for path in (*left, others):
        path.write_text("half")
    tiny_run.run(file, "training.steps=1")
    assert not any(path.exists() for path in left)
    assert others.exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    file = tiny_run.write(tmp_path)
    with pytest.warns(UserWarning, match="run cannot be locked .*No locks available.*: see that no other run writes"):
        tiny_run.run(file, "training.steps=1")
