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
            stack.enter_context(self.on_streams(device))
            if self.default_device.type != "cpu":
                same = (
                    self.default_device.type == device.type
                )  # "cuda" is then the stage's own, not the process's first
                stack.enter_context(torch.device(device) if same else self.default_device)
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(_no_cast_cache())
            yield

    def on_streams(self, device: torch.device | None = None) -> AbstractContextManager[None]:
        """Make the captured streams current inside, and ``device``, if it is an accelerator."""
        return current(self.streams, device) if self.streams else _NOTHING

    def rejoin(self, tensors: Iterable[Tensor | None]) -> None:
        """Let this thread's current streams, if they are others by now, wait for the captured ones.

        Torch's warning of gradients that reach parameters on another stream is then off for the rest of the process.

        Args:
            tensors: What was made on those and will be used on these.
        """
        for stream in self.streams:
            here = torch.accelerator.current_stream(stream.device)
            if here != stream:
                # Parameters' gradients then reach their leaves from other streams than forward's, which have waited.
                torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
                here.wait_event(stream.record_event())
                for tensor in tensors:
                    if tensor is not None and tensor.device == stream.device:
                        tensor.record_stream(here)

    def autocasting(self) -> AbstractContextManager[Any]:
        """The captured autocast."""
        if not self.autocast:
            return _NOTHING
        stack = ExitStack()
        for device_type, dtype in self.autocast:
            stack.enter_context(torch.autocast(device_type, dtype, cache_enabled=False))
        return stack


@contextmanager
def current(streams: Sequence[torch.Stream], device: torch.device | None = None) -> Iterator[None]:
    """Make ``streams``, of different devices, current inside, and ``device``, if it is an accelerator.

    A stream entered as a context manager keeps what was current before on itself: threads that share it would get each
    other's.
    """
    index = torch.accelerator.current_device_index()
    before = [torch.accelerator.current_stream(stream.device) for stream in streams]
    try:
        for stream in streams:
            torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(index if device is None or device.type == "cpu" else device)
        yield
    finally:
        for stream in before:
            torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(index)


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
