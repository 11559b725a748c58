"""What a pipe takes over from the module it wraps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import isfunction
from typing import Any, TypeVar

from torch import Tensor, nn

from gpipe.partitioning.cells import Cell

T = TypeVar("T")

_OWN = {"step", "recording", "metered"}  # set again in every mini-batch


def entry(registry: Mapping[str, T | None], name: str) -> T | None:
    """A parameter, buffer or child of a module; None where there is none. ``ScriptModule``'s have no ``get``."""
    return registry[name] if name in registry else None


def switched(module: nn.Module, cells: Iterable[Cell], mode: bool) -> None:
    """Set training mode on a module, in the way of its own if it has one, and on cells that are no part of it."""
    inside = set(module.modules())
    for _, cell in cells:
        if cell not in inside:
            cell.train(mode)
    module.train(mode)  # last: it has the say over what such cells share with it


@contextmanager
def shared_buffers(module: nn.Module, cells: Iterable[Cell]) -> Iterator[None]:
    """Cast or move inside: a buffer that ``module`` and a cell that is no part of it both hold stays one."""
    inside = set(module.modules())
    outside = {m: None for _, cell in cells for m in cell.modules() if m not in inside}
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for m in (*outside, *inside):
        for name, buffer in m._buffers.items():
            if buffer is not None:
                places.setdefault(buffer, []).append((m, name))
    yield
    for buffer, held in places.items():
        if held[0][0] in outside:
            now = next((b for m, name in held if (b := m._buffers[name]) is not buffer), buffer)
            for m, name in held:
                m._buffers[name] = now


def links(module: nn.Module, cells: Iterable[Cell]) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Where the cells hang: parent and name of each that is a part of ``module``, and of the parts it is in."""
    parents: dict[nn.Module, tuple[nn.Module, str]] = {}
    for parent in module.modules():
        for name, child in parent._modules.items():
            if child is not None:
                parents.setdefault(child, (parent, name))
    found = {}
    for _, part in cells:
        while part in parents and part not in found:
            found[part] = parents[part]
            part = parents[part][0]
    return found


def refuse_hooks(module: nn.Module, call: str) -> None:
    """Raise a RuntimeError if the wrapped module has hooks, where ``call`` does not run its forward as one call."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks:
        raise RuntimeError(
            f"the wrapped module has forward or backward hooks, which {call} would pass over: register them on its "
            "cells, or call pipe(inputs) and loss.backward()"
        )


def refuse_graphed(cells: Iterable[Cell]) -> None:
    """Raise a RuntimeError if a cell, or a part of one, is what ``torch.cuda.make_graphed_callables`` made of it."""
    for name, cell in cells:
        for part, m in cell.named_modules():
            if any(isfunction(f) and "make_graphed_callables.<locals>" in f.__qualname__ for f in vars(m).values()):
                where = f"{name}.{part}" if part else name
                raise RuntimeError(
                    f"cell {where} ({type(m).__name__}) runs as a CUDA graph (torch.cuda.make_graphed_callables), "
                    "which keeps its outputs and activations in the same memory every time: micro-batches in flight "
                    "would overwrite each other's. Wrap the module as it was before, or use torch.compile on its cells"
                )


def registries(module: nn.Module) -> dict[str, Any]:
    """What makes ``module`` an ``nn.Module`` - parameters, buffers, children, hooks - as the very same objects.

    Raises:
        ValueError: It has something under a name that a pipe needs for itself.
    """
    if taken := sorted(_OWN & {*module._parameters, *module._buffers, *module._modules}):
        raise ValueError(
            f"the module has something named {taken[0]!r}, which is an attribute of the pipe: rename it, or wrap "
            "nn.Sequential(module)"
        )
    return {key: vars(module)[key] for key in vars(nn.Module())}
