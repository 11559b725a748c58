"""Forward's side effects on buffers, kept from happening twice.

A recompute runs forward again. Where forward also changes buffers (running statistics, the vectors of a spectral norm),
the recompute must start from the values forward started from, and must leave none of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpipe.cells import entry
from gpipe.memory import version

Place = tuple[nn.Module, str]


@dataclass(frozen=True, slots=True)
class Before:
    """What a forward started from.

    Attributes:
        modules: Whose buffers they are.
        buffers: Every buffer; those that forward changes as copies, None where one is yet to be.
        versions: Of the buffers that are no copies, a number that changes when they are written to.
    """

    modules: Sequence[nn.Module]
    buffers: dict[Place, Tensor | None]
    versions: dict[Place, int]


class ChangingBuffers:
    """Which buffers modules change in their forward, learned for every pattern of training flags."""

    def __init__(self) -> None:
        self._changing: dict[tuple[tuple[int, bool], ...], set[nn.Module]] = {}

    @contextmanager
    def watched(self, modules: Sequence[nn.Module]) -> Iterator[Before]:
        """Run a forward inside; gives what it started from."""
        buffers = {(m, name): b for m in modules for name, b in m._buffers.items() if b is not None}
        unset: dict[Place, Tensor | None] = {(m, n): None for m in modules for n, b in m._buffers.items() if b is None}
        versions = {place: version(b) for place, b in buffers.items()}
        pattern = tuple((id(m), m.training) for m in modules)
        known = self._changing.get(pattern)
        copies = copied({place: b for place, b in buffers.items() if known is None or place[0] in known})
        before = Before(modules, {**unset, **buffers, **copies}, versions)
        yield before
        changing = self._changing.setdefault(pattern, set())
        for (m, name), b in buffers.items():
            written = version(b) != versions[m, name] or (known is None and not torch.equal(b, copies[m, name]))
            if written or entry(m._buffers, name) is not b:
                changing.add(m)
        for place in copies:
            if place[0] in changing:
                del versions[place]
            else:
                before.buffers[place] = buffers[place]


def copied(buffers: dict[Place, Tensor]) -> dict[Place, Tensor]:
    """Clones, made together where buffers are many and kernels cost more than bytes: on an accelerator."""
    copies = {place: b.clone() for place, b in buffers.items() if b.device.type == "cpu" or not _plain(b)}
    alike: dict[tuple[torch.device, torch.dtype], list[Place]] = {}
    for place, b in buffers.items():
        if place not in copies:
            alike.setdefault((b.device, b.dtype), []).append(place)
    for places in alike.values():
        own = [buffers[place] for place in places]
        made = [torch.empty_like(b) for b in own]
        torch._foreach_copy_(made, own)
        copies.update(zip(places, made, strict=True))
    return copies


def _plain(buffer: Tensor) -> bool:
    return type(buffer) is Tensor and buffer.layout is torch.strided and not buffer.requires_grad


@contextmanager
def rewound(before: Before) -> Iterator[None]:
    """Run a forward inside that starts from ``before``, and whose changes are dropped.

    Raises:
        RuntimeError: A buffer of which no copy was made has been written to.
    """
    for (m, name), number in before.versions.items():
        buffer = before.buffers[m, name]
        if buffer is not None and version(buffer) != number:
            raise RuntimeError(
                f"the buffer {name!r} of {type(m).__name__} was modified in place after forward began, so a recompute "
                "would not repeat it: modify it after backward, or wrap with checkpoint='never' and leave two_pass out"
            )
    now = {(m, name): entry(m._buffers, name) for m, name in before.buffers}
    later = {(m, name): b for m in before.modules for name, b in m._buffers.items() if (m, name) not in now}
    for m, name in later:
        del m._buffers[name]  # forward registered it
    kept = {place: b for place, b in before.buffers.items() if b is not None and place not in before.versions}
    for (m, name), value in (before.buffers | copied(kept)).items():
        m._buffers[name] = value
    try:
        yield
    finally:
        now |= later
        for (m, name), buffer in now.items():
            m._buffers[name] = buffer
