"""The module ``torch.sim``, as ``torch.get_device_module("sim")`` gives it: what ``torch.cuda`` is for CUDA."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpipe.testing.accelerators.build import native

Stream = torch.Stream
Event = torch.Event

default_generators: tuple[torch.Generator, ...] = ()
_initialized = True  # torch.utils.checkpoint keeps the states of generators only then


@dataclass(frozen=True)
class Properties:
    """What a device is.

    Attributes:
        name: As ``get_device_name`` gives it.
        total_memory: In bytes.
        uuid: The same in every process.
    """

    name: str
    total_memory: int
    uuid: uuid.UUID


def _index(device: Any = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


# --- devices and streams ----------------------------------------------------------------------------------------------


def is_available() -> bool:
    """Always."""
    return True


def is_initialized() -> bool:
    """Always."""
    return True


def init() -> None:
    """Nothing: ``start`` has."""


def _lazy_init() -> None:
    pass


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """How many were started."""
    return int(native().device_count())


def current_device() -> int:
    """The calling thread's."""
    return torch.accelerator.current_device_index()


def set_device(device: Any) -> None:
    """Let the calling thread use that device."""
    torch.accelerator.set_device_index(_index(device))


class device:
    """A context in which another device is the current one."""

    def __init__(self, device: Any) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = current_device()
        set_device(self._index)

    def __exit__(self, *error: object) -> None:
        set_device(self._before)


def get_device_name(device: Any = None) -> str:
    """Of all of them the same."""
    return "simulated accelerator"


def get_device_properties(device: Any = None) -> Properties:
    """Name, memory and identity."""
    index = _index(device)
    return Properties(
        name=get_device_name(index),
        total_memory=torch.accelerator.get_memory_info(index)[1],
        uuid=uuid.uuid5(uuid.NAMESPACE_OID, f"gpipe sim:{index}"),
    )


def synchronize(device: Any = None) -> None:
    """Wait for all streams of a device."""
    torch.accelerator.synchronize(_index(device))


def current_stream(device: Any = None) -> torch.Stream:
    """The calling thread's on that device."""
    return torch.accelerator.current_stream(_index(device))


def set_stream(stream: torch.Stream) -> None:
    """Let the calling thread use that stream."""
    torch.accelerator.set_stream(stream)


def stream(stream: torch.Stream) -> AbstractContextManager[Any]:
    """A context in which that stream is the current one."""
    return stream


# --- memory -----------------------------------------------------------------------------------------------------------


def empty_cache() -> None:
    """Nothing: no memory is kept."""


def memory_allocated(device: Any = None) -> int:
    """Bytes in use."""
    return torch.accelerator.memory_allocated(_index(device))


def max_memory_allocated(device: Any = None) -> int:
    """Most bytes in use since ``reset_peak_memory_stats``."""
    return torch.accelerator.max_memory_allocated(_index(device))


def reset_peak_memory_stats(device: Any = None) -> None:
    """Let the peak be what is in use now."""
    torch.accelerator.reset_peak_memory_stats(_index(device))


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Bytes that are free, and bytes in all."""
    return torch.accelerator.get_memory_info(_index(device))


# --- random numbers ---------------------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    """Seed the current device's generator."""
    default_generators[current_device()].manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices."""
    for generator in default_generators:
        generator.manual_seed(seed)


def initial_seed() -> int:
    """The seed of the current device's generator."""
    return default_generators[current_device()].initial_seed()


def get_rng_state(device: Any = None) -> Tensor:
    """Seed and offset of a device's generator: a tensor of 16 bytes."""
    return default_generators[_index(device)].get_state()


def set_rng_state(new_state: Tensor, device: Any = None) -> None:
    """Give a device's generator a seed and an offset."""
    default_generators[_index(device)].set_state(new_state)


def get_rng_state_all() -> list[Tensor]:
    """Of every device."""
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: Iterable[Tensor]) -> None:
    """Of every device."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


# --- autocast ---------------------------------------------------------------------------------------------------------


def get_amp_supported_dtype() -> list[torch.dtype]:
    """What autocast may cast to."""
    return [torch.float16, torch.bfloat16, torch.float32]


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Always."""
    return True
