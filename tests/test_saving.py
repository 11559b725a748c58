import os
from pathlib import Path

import pytest
import torch
from disks import room_for

from gpipe.training.errors import RunError
from gpipe.training.saving import read_weights, replacing, write_text, write_weights


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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
