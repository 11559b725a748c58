"""Data that changed since a run was trained on them are noticed."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from PIL import Image

from gpipe.training.build import build_run_data, make_plan
from gpipe.training.data_digest import digest
from gpipe.training.errors import ConfigurationError
from gpipe.training.reading import read_configuration
from gpipe.training.scoring import score

ROWS = 10


def paint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def write_captions(path: Path, captions: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *captions.items()])


CAPTIONS = {f"{i}.png": f"number {i}" for i in range(ROWS)}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Data of every kind, by kind."""
    for i in range(ROWS):
        paint(tmp_path / "photos" / ("cat" if i < 5 else "dog") / f"{i}.png")
        paint(tmp_path / f"{i}.png")
    write_captions(tmp_path / "captions.csv", CAPTIONS)
    (tmp_path / "novel.txt").write_bytes(bytes(range(100)))
    images = {"image_size": 8, "context_length": 16}
    return {
        "digits": {"name": "digits"},
        "photos": {"name": "image_folder", "path": str(tmp_path / "photos"), **images},
        "captions": {"name": "captions_csv", "path": str(tmp_path / "captions.csv"), **images},
        "text": {"name": "text", "path": str(tmp_path / "novel.txt"), "context_length": 8},
    }


def found(folder: Path, settings: dict[str, Any], *overrides: str) -> str:
    file = tiny_run.write(folder, data=settings)
    return digest(build_run_data(make_plan(read_configuration(file, overrides), file)))


def one_row_more(folder: Path) -> None:
    paint(folder / "photos" / "cat" / "10.png")
    write_captions(folder / "captions.csv", {**CAPTIONS, "./0.png": "another"})
    (folder / "novel.txt").write_bytes(bytes(range(110)))


def other_names(folder: Path) -> None:
    """As many rows, in the same order, of other images."""
    for i in range(ROWS):
        where = folder / "photos" / ("cat" if i < 5 else "dog")
        (where / f"{i}.png").rename(where / f"{i} again.png")
        paint(folder / f"{i} again.png")
    write_captions(folder / "captions.csv", {f"{i} again.png": f"number {i}" for i in range(ROWS)})
    (folder / "novel.txt").write_bytes(bytes(range(1, 101)))


def other_labels(folder: Path) -> None:
    (folder / "photos" / "dog").rename(folder / "photos" / "zebra")
    write_captions(folder / "captions.csv", {**CAPTIONS, **{f"{i}.png": f"letter {i}" for i in range(ROWS)}})
    (folder / "novel.txt").write_bytes(bytes(range(100))[::-1])


@pytest.mark.parametrize("kind", ["photos", "captions", "text"])
@pytest.mark.parametrize("change", [one_row_more, other_names, other_labels])
def test_a_change_is_seen(
    tmp_path: Path, settings: dict[str, dict[str, Any]], kind: str, change: Callable[[Path], None]
) -> None:
    before = found(tmp_path, settings[kind])
    change(tmp_path)
    assert found(tmp_path, settings[kind]) != before


@pytest.mark.parametrize("kind", ["digits", "photos", "captions", "text"])
def test_what_is_no_change_is_none(tmp_path: Path, settings: dict[str, dict[str, Any]], kind: str) -> None:
    before = found(tmp_path, settings[kind])
    assert found(tmp_path, settings[kind], "training.seed=6") == before
    assert found(tmp_path, settings[kind], "data.evaluate_on=validation") != before
    if kind != "digits":
        shutil.copytree(tmp_path, tmp_path / "moved")
        moved = str(settings[kind]["path"]).replace(str(tmp_path), str(tmp_path / "moved"))
        assert found(tmp_path, settings[kind], f"data.path={moved}") == before


def test_the_rows_are_said(tmp_path: Path, settings: dict[str, dict[str, Any]]) -> None:
    assert found(tmp_path, settings["photos"]).startswith("8 training rows, checksum ")


def test_data_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected data from gpipe\.training\.data\.build_data, got dict"):
        digest({})  # type: ignore[arg-type]


CHANGED = r"data: are not those that .*run was trained on \(8 training rows, .*; now 9 training .*: restore them, or st"


def test_a_run_is_neither_resumed_nor_judged_on_changed_data(
    tmp_path: Path, settings: dict[str, dict[str, Any]]
) -> None:
    model = {**tiny_run.TINY["model"], "arguments": {**tiny_run.TINY["model"]["arguments"], "in_channels": 3}}
    file = tiny_run.write(tmp_path, data=settings["captions"], model=model)
    tiny_run.run(file, "training.steps=1")
    score(tmp_path / "run")
    more = {**CAPTIONS, "10.png": "number 10", "11.png": "number 11"}
    for name in more:
        paint(tmp_path / name)
    write_captions(tmp_path / "captions.csv", more)
    with pytest.raises(ConfigurationError, match=CHANGED):
        score(tmp_path / "run")
    with pytest.raises(ConfigurationError, match=CHANGED):
        tiny_run.run(file, resume=True)
    write_captions(tmp_path / "captions.csv", CAPTIONS)
    tiny_run.run(file, "training.steps=2", resume=True)
    (tmp_path / "run" / "data.txt").unlink()  # as of a run that an earlier version trained
    write_captions(tmp_path / "captions.csv", more)
    score(tmp_path / "run")
