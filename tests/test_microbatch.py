"""Scatter and gather of trees."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from nets import Apply, make_pipe
from torch import nn

from gpipe.microbatch import gather, row_count, scatter, split_sizes


@pytest.mark.parametrize(
    ("rows", "chunks", "sizes"),
    [
        (12, 4, [3, 3, 3, 3]),
        (11, 4, [3, 3, 3, 2]),
        (5, 4, [2, 1, 1, 1]),  # torch.chunk gives 3
        (3, 4, [1, 1, 1]),
        (12, 5, [3, 3, 2, 2, 2]),
        (7, 1, [7]),
        (1, 9, [1]),
        (0, 3, [0]),
    ],
)
def test_sizes(rows, chunks, sizes):
    assert split_sizes(rows, chunks) == sizes
    parts = scatter(torch.arange(rows), chunks)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), torch.arange(rows))


def test_sizes_are_as_many_as_asked_and_nearly_equal():
    for rows in range(1, 40):
        for chunks in range(1, 20):
            sizes = split_sizes(rows, chunks)
            assert len(sizes) == min(rows, chunks)
            assert sum(sizes) == rows
            assert max(sizes) - min(sizes) <= 1


Point = namedtuple("Point", "x y")


def test_trees_are_split_and_put_together():
    tree = {
        "point": Point(torch.arange(5), (torch.ones(5, 2), [torch.zeros(5, 1, 3)])),
        "ordered": OrderedDict(a=torch.arange(5.0), b=None),
        "flags": (True, 1, 2.5, "text", b"bytes", ...),
    }
    parts = scatter(tree, 3)
    assert len(parts) == 3
    assert [p["point"].x.tolist() for p in parts] == [[0, 1], [2, 3], [4]]
    assert all(type(p["point"]) is Point and type(p["ordered"]) is OrderedDict for p in parts)
    assert all(p["flags"] == tree["flags"] for p in parts)
    whole = gather(parts)
    assert torch.equal(whole["point"].y[1][0], tree["point"].y[1][0])
    assert whole["point"].x.tolist() == [0, 1, 2, 3, 4]
    assert whole["flags"] == tree["flags"]
    assert whole["ordered"]["b"] is None


def test_values_without_rows_go_to_every_micro_batch():
    scale = torch.tensor(3.0)
    parts = scatter((torch.arange(4), scale, "text"), 2)
    assert all(part[1] is scale and part[2] == "text" for part in parts)


def test_parts_are_views_and_differentiable():
    x = torch.arange(4.0, requires_grad=True)
    parts = scatter(x, 2)
    assert parts[0].data_ptr() == x.data_ptr()
    (parts[0].sum() * 2 + parts[1].sum() * 3).backward()
    assert x.grad.tolist() == [2, 2, 3, 3]


def test_one_micro_batch_is_the_tree_itself():
    tree = (torch.arange(4), None)
    assert scatter(tree, 1) == [tree]
    assert scatter(tree, 1)[0] is tree
    assert gather([tree]) is tree


# It became two tensors, of which a cell could write to one without the other.
def test_a_tensor_in_two_places_stays_one():
    x = torch.arange(4)
    for part in scatter((x, [x]), 2):
        assert part[0] is part[1][0]


def test_rows_that_differ_are_refused_with_both_places():
    tree = {"a": [torch.ones(5, 2)], "b": torch.ones(4)}
    for refuse in (row_count, lambda tree: scatter(tree, 2), make_pipe(nn.Sequential(nn.Identity()))):
        with pytest.raises(
            ValueError, match=r"same number of rows.*input\['a'\]\[0\] has 5, input\['b'\] has 4 \(shape \(4,\)\)"
        ):
            refuse(tree)


@pytest.mark.parametrize("tree", [3, None, [], {"x": torch.tensor(1.0)}, "text", ((), {})])
def test_no_rows_are_refused(tree):
    with pytest.raises(TypeError, match=r"at least one tensor with a batch dimension.*got"):
        scatter(tree, 2)


# It went to every micro-batch whole.
def test_arrays_are_refused():
    with pytest.raises(TypeError, match=r"input\[1\] is a ndarray, which would not be split.*torch.as_tensor"):
        scatter((torch.ones(4), np.ones(4)), 2)
    assert scatter((torch.ones(4), np.float64(2.0)), 2)[1][1] == 2.0


def test_no_work_is_done_on_a_refused_input():
    calls = []
    pipe = make_pipe(nn.Sequential(Apply(calls.append)))
    with pytest.raises(ValueError, match="same number of rows"):
        pipe((torch.ones(3), torch.ones(4)))
    assert calls == []
    assert pipe.step == 0


@pytest.mark.parametrize(
    ("trees", "error", "match"),
    [
        ([torch.tensor(1.0)] * 2, TypeError, r"output is a 0-dim tensor, one of each micro-batch.*shape \(1,\)"),
        ([{"a": torch.tensor(1.0)}] * 2, TypeError, r"output\['a'\] is a 0-dim tensor"),
        ([(torch.ones(1),), torch.ones(1)], TypeError, "same structure: micro-batch 0 gave .*, micro-batch 1 gave"),
        (
            [(torch.ones(1), 1), (torch.ones(1), 2)],
            TypeError,
            r"output\[1\] is no tensor and differs .*\(1 and others\)",
        ),
        ([(torch.ones(1), 1), (torch.ones(1), None)], TypeError, r"output\[1\] is no tensor and differs"),
        ([(torch.ones(1),), (1,)], TypeError, r"output\[0\] is no tensor and differs"),
        ([(1,), (torch.ones(1),)], TypeError, r"output\[0\] is no tensor and differs"),
        ([np.ones(2), np.ones(2)], TypeError, "output is no tensor and differs"),
        ([torch.ones(1, 2), torch.ones(1, 3)], ValueError, r"output has shape \(1, 2\) and \(1, 3\).*pad to one size"),
    ],
)
def test_outputs_that_cannot_be_put_together(trees, error, match):
    with pytest.raises(error, match=match):
        gather(trees)


def test_outputs_of_uneven_rows_are_put_together():
    whole = gather([(torch.ones(2, 3), "a", None), (torch.zeros(1, 3), "a", None)])
    assert whole[0].shape == (3, 3)
    assert whole[1:] == ("a", None)


def test_the_same_object_of_any_kind_is_one_value():
    value = np.ones(2)
    assert gather([(torch.ones(1), value)] * 2)[1] is value
