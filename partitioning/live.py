"""Count the bytes that operators hold: storage by storage on the CPU, where no allocator tells, and on accelerators."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gpipe.partitioning.mode import ThreadMode


class LiveBytes(ThreadMode):
    """Bytes of the storages that operators made inside and that still exist; enter it to count.

    Each storage counts once, from the operator that made it until it is freed, wherever that happens. What an operator
    takes and gives back in its inside is not seen, nor are the storages that were there before.

    Attributes:
        live: Bytes held now.
        peak: The most there ever were.
        levels: (seconds of ``time.perf_counter``, bytes held from then on).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.levels = [(perf_counter(), 0)]
        self._held: dict[int, weakref.finalize[Any, Any]] = {}
        self._lock = threading.RLock()  # a collection of garbage may free a storage while one is being booked

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and book what it made."""
        outputs = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        if made:
            given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for tensor in made:
                if _address(tensor) not in given:
                    self.book(tensor)
        return outputs

    def book(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` until it is freed."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        with self._lock:
            if address in self._held:
                return
            self._held[address] = weakref.finalize(storage, self._freed, address, size)
            self._held[address].atexit = False
            self._change(size)
            self.peak = max(self.peak, self.live)

    def restart(self) -> None:
        """Let the peak begin again at what is held now."""
        self.peak = self.live

    def _freed(self, address: int, size: int) -> None:
        with self._lock:
            del self._held[address]
            self._change(-size)

    def _change(self, size: int) -> None:
        self.live += size
        self.levels.append((perf_counter(), self.live))


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


class AllocatedBytes:
    """The same as the allocator of an accelerator tells it; workspaces that operators take meanwhile are in it.

    Args:
        device: The accelerator. Nothing else may use it meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def __enter__(self) -> Self:
        torch.accelerator.synchronize(self._device)
        self._before = torch.accelerator.memory_allocated(self._device)
        self.restart()
        return self

    def __exit__(self, *error: object) -> None:
        torch.accelerator.synchronize(self._device)

    @property
    def peak(self) -> int:
        """The most there ever were, since it was entered or restarted."""
        return torch.accelerator.max_memory_allocated(self._device) - self._before

    def restart(self) -> None:
        """Let the peak begin again at what is held now."""
        torch.accelerator.reset_peak_memory_stats(self._device)


def meter(device: torch.device) -> LiveBytes | AllocatedBytes:
    """What counts the bytes on ``device``."""
    return AllocatedBytes(device) if allocator_tells(device) else LiveBytes()


def allocator_tells(device: torch.device) -> bool:
    """Whether ``device`` is an accelerator whose allocator tells what is held; some kinds' do not."""
    if device.type in ("cpu", "meta"):
        return False
    try:
        torch.accelerator.memory_allocated(device)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def warm(device: torch.device) -> None:
    """Have an accelerator's libraries take the workspaces they keep: for this thread, and for autograd's.

    The first product in a thread does; cells are then not charged with it.
    """
    if device.type in ("cpu", "meta"):
        return
    with torch.inference_mode(False), torch.enable_grad():
        x, weight, bias = (torch.ones(shape, device=device, requires_grad=True) for shape in ((16, 16), (16, 16), 16))
        torch.nn.functional.linear(x, weight, bias).sum().backward()  # type: ignore[no-untyped-call]
    torch.accelerator.synchronize(device)
