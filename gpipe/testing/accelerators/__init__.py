"""Simulated accelerators: devices of type ``sim`` that behave as GPUs do to PyTorch, on the CPU, with a race detector.

``start(4)`` makes them; in pytest, ``-p gpipe.testing.accelerators --accelerators 4`` does, and fails tests that race.
"""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

COUNT = "GPIPE_SIMULATED_ACCELERATORS"
"""Environment variable with the number of devices, which processes started later take over."""

_native: Any = None


def started() -> bool:
    """Whether this process has simulated accelerators."""
    return _native is not None


def start(count: int = 4) -> None:
    """Build on first use, and register, ``count`` devices ``sim:0`` ...; before anything runs backward."""
    global _native
    if _native is not None:
        return
    os.environ[COUNT] = str(count)
    from torch.utils.cpp_extension import load

    folder = Path(__file__).parent
    build = Path(os.environ.get("GPIPE_SIMULATED_BUILD", Path.home() / ".cache" / "gpipe" / f"sim-{torch.__version__}"))
    build.mkdir(parents=True, exist_ok=True)
    native = load(
        "gpipe_sim", [str(folder / "simulated.cpp")], build_directory=str(build), extra_cflags=["-O1", "-g0", "-w"]
    )
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", _device_module(native))
    torch.utils.generate_methods_for_privateuse1_backend()
    _native = native


def reports() -> list[str]:
    """What the race detector found since ``clear``."""
    return list(dict.fromkeys(_native.reports()))


def clear() -> None:
    """Forget reports and counts."""
    _native.clear()


def counts() -> dict[str, int]:
    """Kernels, copies, crossings (copies between devices) and host_waits since ``clear``."""
    return dict(_native.counts())


def waits() -> dict[str, int]:
    """What the host waited in since ``clear``, and how often."""
    return dict(_native.sync_ops())


def set_link(bandwidth: float, latency: float) -> None:
    """Bytes a second (0: at once) and seconds of every copy between devices."""
    _native.link(bandwidth, latency)


def set_capacity(device: int, size: int) -> None:
    """Bytes that a device has."""
    _native.capacity(device, size)


def spend(x: Tensor, seconds: float) -> Tensor:
    """A copy of ``x`` by a kernel that takes so long on its device."""
    copy: Tensor = torch.ops.gpipe_sim.spend(x, seconds)
    return copy


def _device_module(native: Any) -> types.ModuleType:
    module: Any = types.ModuleType("torch.sim")

    def index(device: Any) -> int:
        if isinstance(device, int):
            return device
        found = torch.device(device).index
        return int(native.current_device()) if found is None else found

    class Device:
        def __init__(self, device: Any) -> None:
            self._index = index(device)

        def __enter__(self) -> None:
            self._before = native.current_device()
            native.set_device(self._index)

        def __exit__(self, *error: object) -> None:
            native.set_device(self._before)

    def manual_seed_all(seed: int) -> None:
        for generator in module.default_generators:
            generator.manual_seed(seed)

    module.device_count, module.current_device = native.device_count, native.current_device
    module.set_device = lambda device: native.set_device(index(device))
    module.is_available = module.is_initialized = lambda: True
    module._lazy_init = lambda: None
    module._is_in_bad_fork = lambda: False
    module.is_bf16_supported = lambda *args: True
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16, torch.float32]
    module.default_generators = tuple(native.default_generators())
    module.get_rng_state = lambda device="sim": module.default_generators[index(device)].get_state()
    module.set_rng_state = lambda state, device="sim": module.default_generators[index(device)].set_state(state)
    module.manual_seed_all = manual_seed_all
    module.manual_seed = lambda seed: module.default_generators[native.current_device()].manual_seed(seed)
    module.synchronize = lambda device=None: torch.accelerator.synchronize(device)
    module.device = Device
    return module  # type: ignore[no-any-return]


def pytest_addoption(parser: Any) -> None:
    """``--accelerators N``."""
    parser.addoption("--accelerators", type=int, default=4, help="number of simulated accelerators")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: Any) -> None:
    """Make the devices before a conftest.py may start autograd's threads."""
    start(early_config.known_args_namespace.accelerators)


@pytest.fixture(autouse=True)
def no_races() -> Any:
    """Fail a test in which the race detector found something."""
    clear()
    yield
    found = reports()
    clear()
    assert not found, "races: " + "\n".join(found)
