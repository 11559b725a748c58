"""Split a mini-batch (any pytree) into micro-batches, and put the outputs together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
)

from gpipe import lanes


def row_count(tree: Any) -> int:
    """The number of rows (size of dimension 0) that all tensors of ``tree`` share.

    Raises:
        TypeError: ``tree`` holds no tensor with a batch dimension, or a leaf hides tensors from the pytree.
        ValueError: Two tensors disagree in their batch dimension.
    """
    leaves = tree_leaves(tree)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) == 1 and all(isinstance(leaf, Tensor) for leaf in leaves):
        return sizes.pop()
    return _rows_by_path(tree)


def _rows_by_path(tree: Any) -> int:
    """``row_count`` of a tree that holds other values too, or is not as it should be."""
    rows: int | None = None
    first = ""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        refuse_hidden_tensors(leaf, f"input{keystr(path)}")
        _refuse_array(leaf, f"input{keystr(path)}")
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            continue
        if rows is None:
            rows, first = leaf.shape[0], keystr(path)
        elif leaf.shape[0] != rows:
            raise ValueError(
                f"every tensor of a mini-batch must have the same number of rows (dimension 0): input{first} has "
                f"{rows}, input{keystr(path)} has {leaf.shape[0]} (shape {tuple(leaf.shape)}). "
                "Give shared values as parameters, 0-dim tensors or Python values, or repeat them per row."
            )
    if rows is None:
        raise TypeError(
            "a mini-batch needs at least one tensor with a batch dimension to be split into micro-batches, "
            f"got {_describe(tree)}"
        )
    return rows


def has_rows(tree: Any) -> bool:
    """Whether a tensor in ``tree`` can be split."""
    return any(isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in tree_leaves(tree))


def moved(tree: Any, device: torch.device) -> Any:
    """``tree`` with its tensors on ``device``; the host waits until they are there, for nothing else."""
    if type(tree) is Tensor:
        return lanes.entered(tree, device)
    return tree_map_only(Tensor, partial(lanes.entered, device=device), tree)


def scatter(tree: Any, chunks: int) -> list[Any]:
    """Split every tensor of ``tree`` along dimension 0 into exactly min(chunks, rows) micro-batches.

    Sizes differ by at most one, larger ones first. 0-dim tensors and values that are no tensors go to every
    micro-batch. The parts are views; the split is recorded by autograd.

    Args:
        tree: Any pytree that holds a tensor with a batch dimension.
        chunks: The number of micro-batches wanted, at least 1.

    Raises:
        TypeError: No tensor to split. ValueError: Tensors disagree in their rows.
    """
    sizes = split_sizes(row_count(tree), chunks)
    if len(sizes) == 1:
        return [tree]
    leaves, spec = tree_flatten(tree)
    split = {id(x): torch.split(x, sizes) for x in leaves if isinstance(x, Tensor) and x.dim() > 0}
    parts = [split.get(id(leaf), [leaf] * len(sizes)) for leaf in leaves]
    return [tree_unflatten(list(micro_batch), spec) for micro_batch in zip(*parts, strict=True)]


def split_sizes(rows: int, chunks: int) -> list[int]:
    """Rows of each micro-batch: min(chunks, rows) numbers that differ by at most one."""
    parts = max(1, min(chunks, rows))
    small, larger = divmod(rows, parts)
    return [small + 1] * larger + [small] * (parts - larger)


def gather(trees: Sequence[Any]) -> Any:
    """Concatenate the tensors of the micro-batches' outputs along dimension 0.

    Values that are no tensors must be equal in every micro-batch and are given once.

    Raises:
        TypeError: An output has no batch dimension, or the micro-batches' outputs differ in structure or in a value
            that is no tensor.
    """
    if len(trees) == 1:
        return trees[0]
    leaves, spec = tree_flatten_with_path(trees[0])
    columns: list[list[Any]] = [[leaf] for _, leaf in leaves]
    for m, tree in enumerate(trees[1:], start=1):
        others, other_spec = tree_flatten(tree)
        if other_spec != spec:
            raise TypeError(
                "every micro-batch must give an output of the same structure: "
                f"micro-batch 0 gave {spec}, micro-batch {m} gave {other_spec}"
            )
        for column, leaf in zip(columns, others, strict=True):
            column.append(leaf)
    joined = [_join(f"output{keystr(path)}", column) for (path, _), column in zip(leaves, columns, strict=True)]
    return tree_unflatten(joined, spec)


def _join(name: str, column: list[Any]) -> Any:
    if all(isinstance(value, Tensor) for value in column):
        if column[0].dim() == 0:
            raise TypeError(
                f"{name} is a 0-dim tensor, one of each micro-batch, and there is no telling how to combine them: "
                "return one value per row, or a tensor of shape (1,) per micro-batch"
            )
        if len({value.shape[1:] for value in column}) > 1:
            raise ValueError(
                f"{name} has shape {' and '.join(str(tuple(value.shape)) for value in column)} in the micro-batches, "
                "which cannot be concatenated along dimension 0: pad to one size"
            )
        return torch.cat(column)
    if not all(_same(value, column[0]) for value in column):
        raise TypeError(
            f"{name} is no tensor and differs between micro-batches ({column[0]!r} and others): return a tensor with a "
            "batch dimension, or the same value for every micro-batch"
        )
    return column[0]


def _same(value: Any, first: Any) -> bool:
    """Whether two values that are not both tensors are one."""
    if value is first:
        return True
    if isinstance(value, Tensor) or isinstance(first, Tensor):
        return False
    try:
        return bool(value == first)
    except ValueError:  # an array compares element by element
        return False


def refuse_hidden_tensors(leaf: Any, name: str) -> None:
    """Raise a TypeError for an object the pytree takes as one value although it holds tensors."""
    if not isinstance(leaf, Tensor) and _holds_tensor(leaf, depth=3):
        raise TypeError(
            f"{name} is a {type(leaf).__qualname__} that holds tensors which the pipeline cannot see: pass a tuple, "
            "list or dict, or register the class with torch.utils._pytree.register_pytree_node"
        )


def _holds_tensor(value: Any, depth: int) -> bool:
    """Whether a tensor is found in ``value``, its items or attributes, or theirs, ``depth`` levels down."""
    if isinstance(value, Tensor):
        return True
    if depth == 0 or value is None or isinstance(value, (bool, int, float, complex, str, bytes, type)):
        return False
    inside: list[Any] = [*getattr(value, "__dict__", {}).values()]
    slots: list[str] = [name for base in type(value).__mro__ for name in getattr(base, "__slots__", ())]
    inside += [getattr(value, name, None) for name in slots]
    if isinstance(value, Mapping):
        inside += value.values()
    elif isinstance(value, (Sequence, Set)):
        inside += value
    return any(_holds_tensor(part, depth - 1) for part in inside)


def _refuse_array(leaf: Any, name: str) -> None:
    if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__") and getattr(leaf, "ndim", False):
        raise TypeError(
            f"{name} is a {type(leaf).__qualname__}, which would not be split into micro-batches: convert it with "
            "torch.as_tensor"
        )


def _describe(tree: Any) -> str:
    leaves, spec = tree_flatten(tree)
    return f"{spec} of {[tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]}"
