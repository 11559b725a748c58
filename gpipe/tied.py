"""Parameters that several cells use, such as an input embedding that is the output layer's weight too.

For the length of a mini-batch every cell but one has a leaf of its own in the parameter's place, on its stage's device;
then their gradients are added up, cell after cell. So no two workers add to the same gradient, and the bits are the
same for every division into stages.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gpipe import lanes
from gpipe.cells import entry
from gpipe.partitioning.cells import Cell


class Place(NamedTuple):
    """Where a cell holds a tied parameter."""

    stage: int
    module: nn.Module
    name: str


Tied = tuple[nn.Parameter, list[list[Place]]]
"""A parameter, and its places, group by group: cells that have a module in common are one group."""


def tied_parameters(stages: Sequence[Sequence[Cell]]) -> list[Tied]:
    """Every parameter of several cells.

    Raises:
        ValueError: Two stages use the same module that has parameters or buffers, or the same buffer.
    """
    users: dict[object, tuple[int, str]] = {}
    found: dict[int, Tied] = {}
    for k, cells in enumerate(stages):
        for cell_name, cell in cells:
            mine: dict[int, list[Place]] = {}
            for name, module in cell.named_modules(prefix=cell_name):
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        _check_user(users, id(buffer), k, f"{name}.{key}")
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        _check_user(users, (id(module), key), k, f"{name}.{key}")
                        found.setdefault(id(parameter), (parameter, []))
                        mine.setdefault(id(parameter), []).append(Place(k, module, key))
            for identity, places in mine.items():
                _add(found[identity][1], places)
    return [tied for tied in found.values() if len(tied[1]) > 1]


class Ties:
    """The tied parameters of some stages, looked for again where modules or parameters were exchanged.

    Args:
        stages: The cells of every stage.

    Raises:
        ValueError: As ``tied_parameters``.
    """

    def __init__(self, stages: Sequence[Sequence[Cell]]) -> None:
        self._stages = stages
        self._find()

    def current(self) -> list[Tied]:
        """Those there are now.

        Raises:
            ValueError: As ``tied_parameters``.
        """
        held = self._held()
        same = len(held) == len(self._seen) and all(a() is b for a, b in zip(self._seen, held, strict=True))
        if not same:
            self._find()
        return self._tied

    def _find(self) -> None:
        self._tied = tied_parameters(self._stages)
        self._modules = list(dict.fromkeys(m for cells in self._stages for _, cell in cells for m in cell.modules()))
        self._seen = [weakref.ref(thing) for thing in self._held()]

    def _held(self) -> list[object]:
        things = (thing for m in self._modules for thing in (*m._parameters.values(), *m._modules.values()))
        return [thing for thing in things if thing is not None]


def _add(groups: list[list[Place]], places: list[Place]) -> None:
    """Add a cell's places to the group that has one of its modules, or as a group of their own."""
    modules = {place.module for place in places}
    for group in groups:
        if any(place.module in modules for place in group):
            group += places
            return
    groups.append(places)


def _check_user(users: dict[object, tuple[int, str]], thing: object, stage: int, name: str) -> None:
    other, other_name = users.setdefault(thing, (stage, name))
    if other != stage:
        raise ValueError(
            f"every module with parameters, and every buffer, must belong to one stage, but stage {other} uses one as "
            f"{other_name!r} and stage {stage} as {name!r}: choose a balance that puts these cells on one stage, give "
            "each a copy (copy.deepcopy), or let two modules share the parameter alone (b.weight = a.weight)"
        )


class Replicas:
    """The leaves of one mini-batch.

    Args:
        tied: Of ``tied_parameters``.
        devices: Of every stage.

    Raises:
        RuntimeError: A cell no longer holds a parameter that is tied.
    """

    def __init__(self, tied: Sequence[Tied], devices: Sequence[torch.device]) -> None:
        self._leaves: list[tuple[nn.Parameter, list[Tensor]]] = []
        self._swaps: list[tuple[Place, Tensor]] = []
        for parameter, groups in tied:
            _check_held(parameter, groups)
            leaves: list[Tensor] = []
            home = next(i for i, places in enumerate(groups) if devices[places[0].stage] == parameter.device)
            for i, places in enumerate(groups):
                leaf = parameter if i == home else _leaf(parameter, devices[places[0].stage])
                leaves.append(leaf)
                self._swaps += [(place, leaf) for place in places if leaf is not parameter]
            self._leaves.append((parameter, leaves))

    @contextmanager
    def in_place(self, stages: Sequence[int]) -> Iterator[None]:
        """Let the cells of some stages find their leaves inside."""
        mine = [(place, leaf) for place, leaf in self._swaps if place.stage in stages]
        before = [place.module._parameters[place.name] for place, _ in mine]
        for place, leaf in mine:
            place.module._parameters[place.name] = leaf  # type: ignore[assignment]  # a leaf serves as well
        try:
            yield
        finally:
            for (place, _), parameter in zip(mine, before, strict=True):
                place.module._parameters[place.name] = parameter

    def add_up(self) -> None:
        """Make the leaves' gradients, added up cell after cell, those of the parameters, and forget them."""
        for parameter, parts in self.parts().items():
            parameter.grad = added(parts, parameter.device)

    def parts(self) -> dict[Tensor, list[Tensor | None]]:
        """The gradients of every tied parameter's leaves, cell after cell; nobody holds them any longer."""
        found: dict[Tensor, list[Tensor | None]] = {}
        for parameter, leaves in self._leaves:
            found[parameter] = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
        return found


def _check_held(parameter: nn.Parameter, groups: Sequence[Sequence[Place]]) -> None:
    for _, module, name in (place for places in groups for place in places):
        if entry(module._parameters, name) is not parameter:
            raise RuntimeError(
                f"the parameter {name!r} of a {type(module).__name__}, which several cells share, was exchanged after "
                "wrapping: exchange it before, or wrap again"
            )


def added(parts: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """The sum of gradients in their order; None where there is none."""
    gradients = lanes.brought([gradient for gradient in parts if gradient is not None], device)
    return reduce(torch.add, gradients) if gradients else None


def _leaf(parameter: nn.Parameter, device: torch.device) -> Tensor:
    """The same values, in the same memory if that is on ``device``."""
    return lanes.brought([parameter.detach()], device)[0].requires_grad_(parameter.requires_grad)
