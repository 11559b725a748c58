"""Python's own source as data: which files, whole ones held out, and what is printed to compare with."""

import gzip
import math
import sysconfig

import pytest
import torch
from pydantic import TypeAdapter

from gpipe.training import data_source
from gpipe.training.config import DataConfig
from gpipe.training.data import build_data
from gpipe.training.data_source import SourceWindows, python_source, source_files
from gpipe.training.text_baselines import gzip_bits, unigram_bits


def config(**settings):
    return TypeAdapter(DataConfig).validate_python({"name": "python_source"} | settings)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Forty files of a library, each of a hundred bytes of its own value, and what is not the library's own."""
    folder = tmp_path / "library"
    (folder / "package").mkdir(parents=True)
    for i in range(40):
        place = folder / "package" if i % 2 else folder
        (place / f"file{i:02}.py").write_bytes(bytes([i]) * 100)
    (folder / "empty.py").touch()
    (folder / "zz_same_as_file00.py").write_bytes(bytes([0]) * 100)
    (folder / "data.txt").write_bytes(b"x" * 100)
    for name in ("site-packages", "test", "package/tests", "package/__pycache__"):
        (folder / name).mkdir()
        (folder / name / "foreign.py").write_bytes(b"foreign")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    return folder


def test_files_are_the_librarys_own_by_path_none_empty_and_none_twice(library):
    files = source_files(library)
    names = [name for name, _ in files]
    assert names == sorted(names)
    assert len(names) == 40
    assert "package/file01.py" in names
    assert {content[0] for _, content in files} == set(range(40))


def test_whole_files_are_held_out(library):
    data = python_source(config(context_length=8), seed=0)
    assert (len(data.train_files), len(data.test_files)) == (36, 4)
    train, test = set(data.train.tolist()), set(data.test.tolist())
    assert not train & test  # every file has a value of its own
    assert train | test == set(range(40))
    assert (len(data.train), len(data.test)) == (3600, 400)
    assert set(data.train_files) | set(data.test_files) == {name for name, _ in source_files(library)}
    seen = torch.cat([torch.cat(data.batch(step, 64), 1) for step in range(3 * data.rows // 64)])
    assert set(seen.unique().tolist()) <= train


def test_validation_holds_out_training_files_and_leaves_the_test_files_alone(library):
    whole = python_source(config(context_length=8, test_fraction=0.25), seed=0)
    division = python_source(config(context_length=8, test_fraction=0.25, evaluate_on="validation"), seed=0)
    assert isinstance(division, SourceWindows)
    parts = [set(part) for part in (division.train_files, division.test_files, whole.test_files)]
    assert [len(part) for part in parts] == [22, 8, 10]
    assert len(set.union(*parts)) == 40
    assert set(division.test.tolist()).isdisjoint(division.train.tolist() + whole.test.tolist())


def test_the_division_does_not_depend_on_the_seed_but_batches_do(library):
    one, again, other = (build_data(config(context_length=8), seed=seed) for seed in (1, 1, 2))
    assert one.test_files == other.test_files
    assert torch.equal(one.batch(5, 4)[0], again.batch(5, 4)[0])
    assert not torch.equal(one.batch(5, 4)[0], other.batch(5, 4)[0])
    inputs, targets = one.batch(0, 4)
    assert (inputs.shape, inputs.dtype) == ((4, 8), torch.int64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_this_pythons_library_is_there():
    data = python_source(config(), seed=0)
    assert data.rows > 10_000
    assert "textwrap.py" in data.train_files + data.test_files
    assert not [name for name in data.train_files if "site-packages" in name]


def test_a_python_without_its_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data_source.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"expected the source of Python's standard library in .* found 0 files"):
        python_source(config(), seed=0)


def test_a_context_longer_than_a_part_is_refused(library):
    with pytest.raises(ValueError, match=r"context_length: expected at most 399.* held-out part, got 1000"):
        python_source(config(context_length=1000), seed=0)


# What bits per byte are compared with


def test_unigram_bits_are_those_of_the_training_frequencies():
    train = torch.tensor([0] * 6 + [1] * 2, dtype=torch.uint8)
    held = torch.tensor([0, 0, 1, 9], dtype=torch.uint8)
    probabilities = [7 / 264, 7 / 264, 3 / 264, 1 / 264]
    assert unigram_bits(train, held) == pytest.approx(-sum(map(math.log2, probabilities)) / 4, rel=1e-12)


def test_gzip_bits_are_those_of_the_compressed_bytes():
    held = torch.randint(4, (5000,)).to(torch.uint8)
    assert gzip_bits(held) == 8 * len(gzip.compress(bytes(held.tolist()), 9, mtime=0)) / 5000
    assert 2 < gzip_bits(held) < 3
    assert gzip_bits(torch.zeros(5000, dtype=torch.uint8)) < 0.1
