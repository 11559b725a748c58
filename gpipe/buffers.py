"""Forward's side effects on buffers, kept from happening twice.

A recompute runs forward again. Where forward also changes buffers (running statistics, the vectors of a spectral norm),
the recompute must start from the values forward started from, and must leave none of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]
Snapshot = dict[Place, Tensor]


class ChangingBuffers:
    """Which buffers of some modules their forward changes, learned for every pattern of training flags."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = [m for module in modules for m in module.modules()]
        self._changing: dict[tuple[bool, ...], list[Place]] = {}

    @contextmanager
    def watched(self) -> Iterator[Snapshot]:
        """Run a forward inside; gives the values from before it of the buffers that it changes."""
        pattern = tuple(m.training for m in self._modules)
        known = self._changing.get(pattern)
        places = self._all() if known is None else known
        originals = {(m, name): m._buffers[name] for m, name in places}
        snapshot = {place: b.clone() for place, b in originals.items() if b is not None}
        yield snapshot
        if known is None:
            changed = {
                m for m, name in snapshot if _changed(m._buffers.get(name), originals[m, name], snapshot[m, name])
            }
            self._changing[pattern] = [place for place in snapshot if place[0] in changed]
            for place in [place for place in snapshot if place[0] not in changed]:
                del snapshot[place]

    def _all(self) -> list[Place]:
        return list({(m, name): None for m in self._modules for name, b in m._buffers.items() if b is not None})


def _changed(now: Tensor | None, original: Tensor | None, before: Tensor) -> bool:
    return now is not original or now is None or not torch.equal(now, before)


@contextmanager
def rewound(snapshot: Snapshot) -> Iterator[None]:
    """Run a forward inside that sees the buffers of ``snapshot``, and whose changes to them are dropped."""
    now = {(m, name): m._buffers[name] for m, name in snapshot}
    for (m, name), value in snapshot.items():
        m._buffers[name] = value.clone()
    try:
        yield
    finally:
        for (m, name), buffer in now.items():
            m._buffers[name] = buffer
