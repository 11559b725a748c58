import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gpipe.training import saving
from gpipe.training.errors import RunError
from gpipe.training.saving import Save, newest_save, read_weights, replacing, write_save, write_text, write_weights


def save_of(step: int, size: int = 8) -> Save:
    return Save(
        format=saving.FORMAT,
        step=step,
        pipe_step=step,
        model={"weight": torch.full((size,), float(step))},
        loss={},
        optimizer={"state": {0: {"momentum": torch.ones(2)}}, "param_groups": [{"betas": (0.9, 0.98), "lr": 0.1}]},
        written_with={"torch": "2"},
    )


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_warning(message: str) -> None:
    raise AssertionError(message)


def test_the_newest_save_comes_back(tmp_path: Path) -> None:
    for step in (5, 10, 1000):
        write_save(tmp_path, save_of(step))
    save = newest_save(tmp_path, no_warning)
    assert save is not None
    assert save["step"] == 1000
    assert torch.equal(save["model"]["weight"], torch.full((8,), 1000.0))
    assert save["optimizer"]["param_groups"] == [{"betas": (0.9, 0.98), "lr": 0.1}]


def test_two_saves_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        write_save(tmp_path, save_of(step))
    assert steps(tmp_path) == ["step-000000015.pt", "step-000000020.pt"]


def test_saves_of_an_abandoned_future_go(tmp_path: Path) -> None:
    for step in (10, 15):
        write_save(tmp_path, save_of(step))
    write_save(tmp_path, save_of(12))
    assert steps(tmp_path) == ["step-000000010.pt", "step-000000012.pt"]


def test_no_save(tmp_path: Path) -> None:
    assert newest_save(tmp_path / "saves", no_warning) is None


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = bytes(content).index(torch.full((8,), 10.0).numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_torch_file(path: Path) -> None:
    torch.save({"step": 10}, path)


def of_another_version(path: Path) -> None:
    torch.save(save_of(10) | {"format": saving.FORMAT + 1}, path)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_off, empty, other_torch_file, of_another_version])
def test_a_damaged_save_is_passed_over(tmp_path: Path, damage: object) -> None:
    for step in (5, 10):
        write_save(tmp_path, save_of(step))
    damage(tmp_path / "step-000000010.pt")  # type: ignore[operator]
    warnings: list[str] = []
    save = newest_save(tmp_path, warnings.append)
    assert save is not None
    assert save["step"] == 5
    assert len(warnings) == 1
    assert "step-000000010.pt is damaged" in warnings[0]


def test_nothing_but_damaged_saves(tmp_path: Path) -> None:
    empty(write_save(tmp_path, save_of(10)))
    with pytest.raises(RunError, match=r"none of the saves in .* can be read"):
        newest_save(tmp_path, lambda message: None)


def test_a_save_cannot_run_code(tmp_path: Path) -> None:
    """A pickle may call anything when it is read; saves are read as plain data."""

    class Touch:
        def __reduce__(self) -> object:
            return os.mkdir, (str(tmp_path / "touched"),)

    torch.save(save_of(3) | {"model": Touch()}, tmp_path / "step-000000003.pt")
    with pytest.raises(RunError, match=r"none of the saves"):
        newest_save(tmp_path, lambda message: None)
    assert not (tmp_path / "touched").exists()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes: to the writer it looks as a full disk does."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_costs_no_earlier_save(tmp_path: Path) -> None:
    write_save(tmp_path, save_of(5))
    with room_for(100_000), pytest.raises(RunError, match=r"step-000000010.pt cannot be written: .*File too large"):
        write_save(tmp_path, save_of(10, size=1_000_000))
    assert steps(tmp_path) == ["step-000000005.pt"]
    save = newest_save(tmp_path, no_warning)
    assert save is not None
    assert save["step"] == 5


def test_a_full_disk_costs_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_weights(path, {"a": torch.ones(2)})
    with room_for(100_000), pytest.raises(RunError, match=r"weights.safetensors cannot be written: .*too large"):
        write_weights(path, {"a": torch.ones(1_000_000)})
    assert torch.equal(read_weights(path)["a"], torch.ones(2))
    assert steps(tmp_path) == ["weights.safetensors"]


def fail_half_way(path: Path, error: BaseException) -> None:
    with replacing(path) as beside:
        beside.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("no")])
def test_a_writer_that_fails_leaves_what_was(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with pytest.raises(type(error), match=r"^no$"):
        fail_half_way(path, error)
    assert path.read_text() == "before"
    assert steps(tmp_path) == ["file.txt"]


def test_what_a_killed_writer_left_is_swept_up(tmp_path: Path) -> None:
    (tmp_path / ".step-000000004.pt.123.partial").write_bytes(b"half")
    write_save(tmp_path, save_of(5))
    assert steps(tmp_path) == ["step-000000005.pt"]


def test_files_reach_the_disk_before_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_text(tmp_path / "file.txt", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_weights_come_back_tied_ones_and_views_too(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    weights = {"z": base, "tied": base, "row": base[1], "turned": base.T, "int": torch.tensor(3), "none": torch.ones(0)}
    write_weights(tmp_path / "w", weights)
    back = read_weights(tmp_path / "w")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_weights(tmp_path / name, {str(i): torch.full((i,), 1.0) for i in range(20)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_files_have_the_permissions_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_weights(tmp_path / "w", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "w").stat().st_mode & 0o777 == 0o640


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no .*none"):
        read_weights(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"x" * 50)
    with pytest.raises(RunError, match=r"bad cannot be read: "):
        read_weights(tmp_path / "bad")
