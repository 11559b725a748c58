"""The caller's modes, which torch keeps per thread, carried to the workers."""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


@dataclass(frozen=True)
class CallerContext:
    """Grad and inference mode, autocast, default device, current streams and context variables of the calling thread.

    Deterministic mode, anomaly detection and default dtype are the process's: workers share them as they are.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_device: torch.device
    streams: tuple[torch.Stream, ...]
    variables: contextvars.Context = field(repr=False)

    @classmethod
    def capture(cls, devices: Sequence[torch.device]) -> CallerContext:
        """The state of the calling thread.

        Args:
            devices: The devices of the pipeline.
        """
        accelerators = {d for d in devices if d.type != "cpu"}
        types = sorted({"cpu", *(d.type for d in accelerators)})
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=tuple((t, torch.get_autocast_dtype(t)) for t in types if torch.is_autocast_enabled(t)),
            default_device=torch.get_default_device(),
            streams=tuple(torch.accelerator.current_stream(d) for d in accelerators),
            variables=contextvars.copy_context(),
        )

    def without_autocast(self) -> CallerContext:
        """The same, autocast off."""
        return replace(self, autocast=())

    @contextmanager
    def applied(self, device: torch.device) -> Iterator[None]:
        """Give this thread the captured state inside, but for autocast, with ``device`` as the current one."""
        with ExitStack() as stack:
            for stream in self.streams:
                torch.accelerator.set_stream(stream)
            if device.type != "cpu":
                torch.accelerator.set_device_index(device)
            if self.default_device.type != "cpu":
                stack.enter_context(self.default_device)
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(_no_cast_cache())
            yield

    def autocasting(self) -> AbstractContextManager[Any]:
        """The captured autocast."""
        if not self.autocast:
            return _NOTHING
        stack = ExitStack()
        for device_type, dtype in self.autocast:
            stack.enter_context(torch.autocast(device_type, dtype, cache_enabled=False))
        return stack


@contextmanager
def _no_cast_cache() -> Iterator[None]:
    """Let no autocast of this thread, a cell's own included, keep the weights it casts.

    Kept from one micro-batch to the next they would tie their graphs; and the cache is the process's: a thread that
    leaves its autocast empties that of the others, whose gradients would then be added up in another type.
    """
    callers = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(callers)


def refuse_transforms(parameters: Iterable[Tensor]) -> None:
    """Raise a RuntimeError where the caller differentiates in a way that the workers' threads cannot know of."""
    if forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "torch.func transforms and forward-mode differentiation do not reach the workers of a pipe: "
            "apply them to the unwrapped module"
        )
    if not all(p.is_leaf for p in parameters):
        raise RuntimeError(
            "a parameter of the pipe is computed from other tensors (torch.func.functional_call?), to which the "
            "workers cannot pass gradients on: compute it in a cell, or call the unwrapped module"
        )


@contextmanager
def autocast_off() -> Iterator[None]:
    """Backward inside runs in the types forward chose, as torch recommends, also where the caller's autocast is on."""
    types = {"cpu", *(device.type for device in [torch.accelerator.current_accelerator()] if device is not None)}
    with ExitStack() as stack:
        for device_type in types:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


_NOTHING = nullcontext()
