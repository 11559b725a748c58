"""Python values as JSON and back, tuples as tuples, with tensors put aside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


def encoded(value: Any, where: str, put: Callable[[str, Tensor], JSON]) -> JSON:
    """A value as JSON.

    Args:
        value: None, a number, text, a tensor, or a list, tuple or dict with text as keys of such.
        where: What it is called, for ``put`` and in messages.
        put: Puts a tensor aside; gives what is to stand in its place.

    Raises:
        TypeError: It is something else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return {"tensor": put(where, value)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encoded(v, f"{where}.{i}", put) for i, v in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encoded(v, f"{where}.{key}", put) for key, v in value.items()}}
    raise TypeError(
        f"{where} is a {type(value).__name__}, but a save holds tensors, numbers, text, None, and lists, tuples and "
        "dicts (with text as keys) of them: keep it elsewhere, or as one of these"
    )


def decoded(value: Any, take: Callable[[Any], Tensor]) -> Any:
    """The value that was encoded.

    Args:
        value: Of ``encoded``.
        take: Gives the tensor for what ``put`` gave.
    """
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return take(inner)
    if kind == "dict":
        return {key: decoded(v, take) for key, v in inner.items()}
    return {"list": list, "tuple": tuple}[kind](decoded(v, take) for v in inner)


def inline(where: str, tensor: Tensor) -> JSON:
    """A small tensor in the JSON itself, such as a learning rate: ``put`` of ``encoded``."""
    if tensor.is_complex():
        raise TypeError(f"{where} is a complex tensor: give it as a number")
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}


def from_inline(value: Any) -> Tensor:
    """The tensor of ``inline``."""
    return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]), device="cpu")
