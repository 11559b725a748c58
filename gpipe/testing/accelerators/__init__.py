"""Simulated accelerators: devices of type ``sim`` that are to PyTorch what GPUs are, on the CPU, with a race detector.

In pytest: ``-p gpipe.testing.accelerators --accelerators 4``; a test in which the detector finds something fails.
Elsewhere:

    >>> import torch
    >>> from gpipe.testing import accelerators
    >>> accelerators.start(2)  # doctest: +SKIP
    >>> x = torch.ones(3, device="sim:0")  # doctest: +SKIP
    >>> with torch.Stream("sim:0"):  # doctest: +SKIP
    ...     y = x * 2  # this stream has not waited for the one that makes x
    >>> print(*accelerators.reports())  # doctest: +SKIP
    aten::mul on stream 2 of sim:0 (thread MainThread) reads what aten::fill_ on the default stream ...

They are built on first use, which needs a C++ compiler, ninja and the headers of Python.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

from gpipe.testing.accelerators import build, issuing
from gpipe.testing.accelerators.left_reports import Leaver

pytest_plugins = ("gpipe.testing.accelerators.plugin",)  # pytest is imported by that module alone

COUNT = "GPIPE_SIMULATED_ACCELERATORS"
"""Environment variable with the number of devices, which processes started later take over."""

MEMORY = "GPIPE_SIMULATED_MEMORY"
"""Environment variable with the bytes of each device, likewise."""

MOST = 127
"""How many devices there can be: PyTorch counts them in eight bits."""

LARGEST = 2**63 - 1
"""How many bytes a device can have."""

_started: tuple[int, int] | None = None
_failure = ""  # why a start failed that cannot be tried again


def started() -> bool:
    """Whether this process has simulated accelerators."""
    return _started is not None


def start(count: int | None = None, memory: int | None = None) -> None:
    """Make the devices ``sim:0``, ``sim:1`` ..., before anything runs backward; a second time it changes nothing.

    Args:
        count: How many. When not given, what the environment variable ``COUNT`` says, or 4.
        memory: Bytes of each. When not given, what the environment variable ``MEMORY`` says, or 16 GiB.

    Raises:
        ValueError: ``count`` is not 1 to 127, ``memory`` not positive, or an environment variable has no number.
        BuildError: They cannot be built here; the message says what to install.
        RuntimeError: This process has others, or autograd has run and knows no such devices.
    """
    count = _number(COUNT, 4) if count is None else count
    memory = _number(MEMORY, 2**34) if memory is None else memory
    if not (1 <= count <= MOST and 1 <= memory <= LARGEST):
        raise ValueError(
            f"expected 1 to {MOST} devices of 1 to {LARGEST} bytes each, was given {count} devices of {memory} bytes"
        )
    if _failure:
        raise RuntimeError(_failure)
    if _started is None:
        _register(count, memory)
    elif _started != (count, memory):
        raise RuntimeError(
            f"this process has {_started[0]} simulated accelerators of {_started[1]} bytes, and was asked for "
            f"{count} of {memory}: start a process of its own for other ones (set_capacity changes memory)"
        )


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number in the environment variable {variable}, was given {text}") from None


def _register(count: int, memory: int) -> None:
    global _started, _failure
    native = build.load()
    try:
        _make(native, count)
    except RuntimeError as error:  # what was registered stays: there is no second try
        _failure = str(error)
        raise
    _started = count, memory
    os.environ[COUNT], os.environ[MEMORY] = str(count), str(memory)
    reset()
    Leaver(reports)
    if torch.distributed.is_available():
        from gpipe.testing.accelerators import collectives

        collectives.register()


def _make(native: Any, count: int) -> None:
    """Make the devices, with all the memory that there can be."""
    native.start(count, LARGEST)
    from gpipe.testing.accelerators import device_module

    device_module.default_generators = tuple(native.default_generators())
    backend_registration.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", device_module)
    backend_registration.generate_methods_for_privateuse1_backend()
    try:
        for index in range(count):
            torch.autograd.backward(torch.zeros((), device=f"sim:{index}", requires_grad=True))
    except RuntimeError as error:
        if "device_ready_queues_" not in str(error):  # where autograd's engine keeps what its threads are to do
            raise
        raise RuntimeError(
            "autograd has run in this process before its simulated accelerators were started, and has no threads for "
            "them: call start() before the first backward (in pytest: -p gpipe.testing.accelerators)"
        ) from None


def reports() -> list[str]:
    """What the race detector found since ``clear``, and what ranks issued that NCCL could not carry out."""
    return list(dict.fromkeys([*build.native().reports(), *issuing.reports()]))


def clear() -> None:
    """Forget reports and counts."""
    build.native().clear()
    issuing.clear()


def reset() -> None:
    """Forget reports and counts, and let links and capacities be as after ``start``."""
    clear()
    if _started is None:
        raise RuntimeError(build.NOT_STARTED)
    set_link(0.0, 0.0)
    for device in range(_started[0]):
        set_capacity(device, _started[1])


def counts() -> dict[str, int]:
    """Since ``clear``: ``kernels``, ``copies``, ``crossings`` (copies between devices) and ``host_waits``."""
    return dict(build.native().counts())


def waits() -> dict[str, int]:
    """How often the host waited since ``clear``, by what it waited in: see ``docs/simulated_accelerators.md``."""
    return dict(build.native().waits())


def set_link(bandwidth: float, latency: float, source: int | None = None, target: int | None = None) -> None:
    """Say how long copies between devices take. One that is under way lets the next one on its link wait.

    Args:
        bandwidth: Bytes a second; 0 for no time. A link is occupied for bytes / bandwidth.
        latency: Seconds that each copy takes besides.
        source: The index of the device that copies leave; all when not given.
        target: The index of the device where copies arrive; all when not given. When neither is given, messages
            between ranks take as long too.

    Raises:
        ValueError: No such number, or no such device.
    """
    if not (bandwidth >= 0 and 0 <= latency < math.inf):
        raise ValueError(f"expected a bandwidth and a latency of 0 or more, was given {bandwidth} and {latency}")
    if source is None and target is None:
        issuing.set_link(bandwidth, latency)
    for a in _indices(source):
        for b in _indices(target):
            build.native().set_link(a, b, bandwidth, latency)


def set_capacity(device: int, size: int) -> None:
    """Say how many bytes a device has; what is allocated stays.

    Raises:
        ValueError: No such device, or fewer than 0 bytes.
    """
    (index,) = _indices(device)
    if not 0 <= size <= LARGEST:
        raise ValueError(f"expected a capacity of 0 to {LARGEST} bytes, was given {size}")
    build.native().set_capacity(index, size)


def spend(x: Tensor, seconds: float) -> Tensor:
    """A copy of ``x``, by a kernel that takes so long on its device (on the CPU: of the calling thread's time)."""
    build.native()
    copy: Tensor = torch.ops.gpipe_sim.spend(x, seconds)
    return copy


def _indices(device: int | None) -> list[int]:
    count = build.native().device_count()
    if device is None:
        return list(range(count))
    if not 0 <= device < count:
        raise ValueError(f"expected the index of one of {count} simulated accelerators, was given {device}")
    return [device]
