from collections import namedtuple

import pytest
import torch

from gpipe.microbatch import gather, row_count, scatter, split_sizes

Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("rows", "chunks", "sizes"),
    [
        (5, 4, [2, 1, 1, 1]),
        (11, 4, [3, 3, 3, 2]),
        (12, 5, [3, 3, 2, 2, 2]),
        (3, 8, [1, 1, 1]),
        (4, 1, [4]),
        (0, 3, [0]),
    ],
)
def test_exactly_as_many_micro_batches_as_can_be(rows, chunks, sizes):
    assert split_sizes(rows, chunks) == sizes
    assert [len(part) for part in scatter(torch.zeros(rows, 2), chunks)] == sizes


def test_scatter_and_gather_keep_the_tree_and_every_row():
    tree = {"a": (torch.arange(7), None), "b": Pair(torch.randn(7, 2), "word"), "c": [torch.tensor(3.0), True]}
    parts = scatter(tree, 3)
    assert [part["b"].y for part in parts] == ["word"] * 3
    assert all(part["c"][0] is tree["c"][0] for part in parts)
    joined = gather([{k: part[k] for k in "ab"} for part in parts])
    assert torch.equal(joined["a"][0], tree["a"][0])
    assert joined["a"][1] is None
    assert torch.equal(joined["b"].x, tree["b"].x)
    assert isinstance(joined["b"], Pair)


def test_scatter_gives_views_and_gather_of_one_gives_it_back():
    x = torch.randn(6, 2)
    first, _ = scatter(x, 2)
    assert first.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert gather([x]) is x


def test_disagreeing_rows_are_refused_and_named():
    with pytest.raises(ValueError, match=r"input\['x'\] has\s+4,\s+input\['y'\] has 3 \(shape \(3, 2\)\)"):
        row_count({"x": torch.zeros(4), "y": torch.zeros(3, 2)})


@pytest.mark.parametrize("tree", [None, 3, {"x": torch.tensor(1.0)}, []])
def test_nothing_to_split_is_refused(tree):
    with pytest.raises(TypeError, match="at least one tensor with a batch dimension"):
        row_count(tree)


class Holder:
    def __init__(self):
        self.hidden = torch.zeros(4)


def test_an_object_that_hides_tensors_is_refused():
    with pytest.raises(TypeError, match=r"input\[1\] is a Holder that holds tensors which"):
        row_count((torch.zeros(4), Holder()))


def test_outputs_that_cannot_be_put_together_are_refused():
    with pytest.raises(TypeError, match="0-dim tensor"):
        gather([torch.tensor(1.0), torch.tensor(2.0)])
    with pytest.raises(TypeError, match=r"output\[1\] is no tensor and differs between micro-batches \(1 and others\)"):
        gather([(torch.zeros(1), 1), (torch.zeros(1), 2)])
    with pytest.raises(TypeError, match=r"same structure: micro-batch 0 gave .*, micro-batch 1 gave"):
        gather([(torch.zeros(1),), [torch.zeros(1)]])
    with pytest.raises(TypeError, match="differs between micro-batches"):
        gather([torch.zeros(1), None])
