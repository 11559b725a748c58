import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpipe.partitioning.cost import CellCost, Profile, SkipCost, load_costs, save_costs

CELL = CellCost("block", 0.25, 0.5, 100, 20, 40, 8)
NUMBERS = ["forward_seconds", "backward_seconds", "activation_bytes", "boundary_bytes", "parameter_bytes"]
FILE = """
format: gpipe.costs
version: 1
input_bytes: 12
cells:
- {name: a, forward_seconds: 1.0, backward_seconds: 2, activation_bytes: 3, boundary_bytes: 4, parameter_bytes: 5}
- {name: b, forward_seconds: 1.5, backward_seconds: 2.5, activation_bytes: 0, boundary_bytes: 6, parameter_bytes: 0,
   workspace_bytes: 7}
"""
SKIPS = "workspace_bytes: 7, skips: [{cells_on: 2, value_bytes: 9}]"


def written(tmp_path, text):
    path = tmp_path / "costs.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numpy_numbers_become_plain_ones():
    cell = CellCost("c", np.float32(0.5), np.int64(2), np.int64(3), 4.0, np.float64(5))
    assert [type(getattr(cell, key)) for key in NUMBERS] == [float, float, int, int, int]
    assert cell == CellCost("c", 0.5, 2.0, 3, 4, 5)


@pytest.mark.parametrize("field", [*NUMBERS, "workspace_bytes"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "12", None, True, 1j, 10**400])
def test_what_is_no_cost_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"cell 'block': {field}: expected .*0 or more.*got"):
        replace(CELL, **{field: value})


@pytest.mark.parametrize("field", ["cells_on", "value_bytes", "kept_bytes", "handed_on_bytes", "gradient_bytes"])
@pytest.mark.parametrize("value", [-1, 1.5, math.nan, "12", True])
def test_what_is_no_cost_of_a_skip_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"skip: {field}: expected .*got"):
        replace(SkipCost(1, 2, 3, 4, 5, 6), **{field: value})


def test_a_skip_leads_to_a_later_cell_and_is_one():
    with pytest.raises(ValueError, match="cells_on: expected 1 or more, got 0: only a later cell can pop it"):
        SkipCost(0, 1)
    with pytest.raises(ValueError, match=r"cell 'block': skips: expected SkipCosts, got \(1, 2\) among them"):
        replace(CELL, skips=[(1, 2)])


def test_what_is_not_known_of_a_skip_is_taken_to_be_as_large_as_it():
    assert [(s.kept, s.gradient, s.passing) for s in (SkipCost(1, 9), SkipCost(1, 9, 3, 0, 5, 20))] == [
        (9, 9, 9),
        (3, 5, 20),
    ]


def test_bytes_are_whole():
    with pytest.raises(ValueError, match=r"cell 'block': activation_bytes: .*got 1\.5: round it up"):
        replace(CELL, activation_bytes=1.5)


def test_a_number_written_as_text_comes_with_the_remedy():
    with pytest.raises(ValueError, match=r"got '1e-5': write 1\.0e-5"):
        replace(CELL, forward_seconds="1e-5")


seconds = st.floats(0, 1e6, allow_nan=False)
sizes = st.integers(0, 2**50)
skips = st.builds(SkipCost, st.integers(1, 99), sizes, st.none() | sizes, sizes, st.none() | sizes, st.none() | sizes)
cells = st.builds(
    CellCost, st.text(max_size=8), seconds, seconds, sizes, sizes, sizes, sizes, skips=st.lists(skips, max_size=2)
)
words = st.none() | st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.lists(cells, min_size=1, max_size=5), sizes, st.none() | st.integers(1, 99), words)
@settings(max_examples=60, deadline=None)
def test_what_is_saved_is_loaded(tmp_path_factory, costs, input_bytes, rows, device):
    path = tmp_path_factory.getbasetemp() / "costs.yaml"
    save_costs(path, costs, input_bytes=input_bytes, micro_batch_rows=rows, device=device)
    assert load_costs(path) == Profile(tuple(costs), input_bytes, rows, device)


def test_a_hand_written_file(tmp_path):
    profile = load_costs(written(tmp_path, FILE))
    assert profile.input_bytes == 12
    assert profile.device is None
    assert profile.cells == (CellCost("a", 1, 2, 3, 4, 5), CellCost("b", 1.5, 2.5, 0, 6, 0, 7))


def test_a_file_names_skips_where_there_are_some(tmp_path):
    profile = load_costs(written(tmp_path, FILE.replace("workspace_bytes: 7", SKIPS)))
    assert [cell.skips for cell in profile.cells] == [(), (SkipCost(2, 9),)]
    save_costs(tmp_path / "again.yaml", profile.cells)
    assert (tmp_path / "again.yaml").read_text().count("skips") == 1  # older versions read files without


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("workspace_bytes: 7", "skips: 7", r"cells\[1\] \('b'\): skips: expected a list, got 7"),
        ("workspace_bytes: 7", "skips: [7]", r"cells\[1\] \('b'\): skips: expected keys and values, got 7"),
        ("workspace_bytes: 7", SKIPS.replace("on: 2", "on: 0"), r"cells\[1\] \('b'\): skip: cells_on: .* got 0"),
        ("workspace_bytes: 7", SKIPS.replace("value", "val"), r"cells\[1\] \('b'\): skips: value_bytes is missing"),
        ("workspace_bytes: 7", SKIPS.replace("9", "9, to: x"), r"\('b'\): skips: 'to' is not a key: use cells_on, "),
        ("forward_seconds: 1.5", "forward_seconds: .nan", r"cells\[1\]: cell 'b': forward_seconds: .* got nan"),
        ("forward_seconds: 1.5", "forward_seconds: 1e-5", r"cells\[1\]: cell 'b': forward_seconds: .* write 1\.0e-5"),
        ("boundary_bytes: 6", "boundary_bytes: -6", r"cells\[1\]: cell 'b': boundary_bytes: .* got -6"),
        ("boundary_bytes: 6,", "", r"cells\[1\] \('b'\): boundary_bytes is missing"),
        ("boundary_bytes: 6", "boundary_byte: 6", r"cells\[1\] \('b'\): boundary_bytes is missing"),
        ("workspace_bytes: 7", "workspce_bytes: 7", r"cells\[1\] \('b'\): 'workspce_bytes' is not a key: use name, "),
        ("name: b", "name: 3", r"cells\[1\] \(3\): name: expected text, got 3"),
        ("name: b, ", "", r"cells\[1\] \('unnamed'\): name is missing"),
        ("version: 1", "version: 2", r"version: expected 1, got 2: profile again"),
        ("version: 1", "", r"version: expected 1, got None"),
        ("format: gpipe.costs", "format: gpipe.run", r"expected a file of cell costs with 'format: gpipe\.costs'"),
        ("input_bytes: 12", "input_bytes: -12", r"input_bytes: .* got -12"),
        ("input_bytes: 12", "micro_batch_rows: 0", r"micro_batch_rows: expected 1 or more, got 0"),
        ("input_bytes: 12", "device: 7", r"device: expected words, got 7"),
        ("input_bytes: 12", "inputs: 12", r"the file: 'inputs' is not a key: use format, "),
        ("- {name: a,", "- nothing\n- {name: a,", r"cells\[0\]: expected keys and values, got 'nothing'"),
        ("cells:", "cells: [", r"is not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_file_cell_and_key(tmp_path, old, new, message):
    assert old in FILE
    path = written(tmp_path, FILE.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_costs(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("cells", ["[]", "{a: 1}", ""])
def test_a_file_without_cells_is_refused(tmp_path, cells):
    path = written(tmp_path, f"{FILE[: FILE.index('cells:')]}cells: {cells}")
    with pytest.raises(ValueError, match="cells: expected a list of at least one cell, got"):
        load_costs(path)


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "just words"])
def test_another_file_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="expected a file of cell costs"):
        load_costs(written(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "costs.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"costs\.yaml is not a text file in UTF-8"):
        load_costs(path)


def test_nothing_is_no_profile(tmp_path):
    with pytest.raises(ValueError, match="a profile needs at least one cell, got none"):
        save_costs(tmp_path / "costs.yaml", [])


def test_without_yaml_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = written(tmp_path, FILE)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install pyyaml"):
        load_costs(path)
    with pytest.raises(ImportError, match="pip install pyyaml"):
        save_costs(path, [CELL])
