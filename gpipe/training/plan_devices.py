"""Which devices a plan is for: ``--devices`` read and checked, or those of this machine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from gpipe.balancing import memory_bytes
from gpipe.partitioning.estimate import Speed
from gpipe.partitioning.problem import Link
from gpipe.training.config import PipelineConfig, Section
from gpipe.training.errors import ConfigurationError
from gpipe.training.hardware import FACTS, Device, Precision, known_device
from gpipe.training.problems import allowed_keys, close_match, described, shown
from gpipe.training.reading import read_values

_MOST = 4096
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LinkEntry(Section):
    """A link of a devices file.

    Attributes:
        latency: seconds before a message begins to arrive.
        bandwidth: bytes per second, one way.
    """

    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bandwidth: _Rate


class DeviceEntry(Section):
    """A device of a devices file, by what it sustains in training: the numbers are taken as they are.

    Attributes:
        flops: operations per second, a multiplication and an addition counted as two.
        bytes_per_second: from and to its memory.
        memory: such as ``80GiB``.
        link: to its neighbours; between unlike devices the slower of the two counts.
    """

    flops: _Rate
    bytes_per_second: _Rate
    memory: str | int
    link: LinkEntry


def named_devices(option: str, precision: Precision) -> list[Device]:
    """The devices of ``--devices``: a count and a name, such as ``8xH100``, or a YAML file with a list of devices.

    Raises:
        ConfigurationError: It is neither, or the file is wrong; names the key.
    """
    if option.endswith((".yaml", ".yml")):
        return _of_file(Path(option), precision)
    try:
        return _counted(option, precision)
    except ValueError as error:
        raise ConfigurationError("--devices", [str(error)]) from None


def _counted(text: str, precision: Precision) -> list[Device]:
    found = re.fullmatch(r"\s*(?:(\d+)\s*x\s*)?(\S+)\s*", text)
    known = {name.casefold(): name for name in FACTS}
    if found is None or found[2].casefold() not in known:
        hint = close_match(found[2] if found else text, FACTS)
        raise ValueError(
            f"should be a count and a name such as 8xH100, or a file ending in .yaml, given {text!r}{hint} (known: "
            f"{', '.join(FACTS)})"
        )
    count = int(found[1] or 1)
    if not 1 <= count <= _MOST:
        raise ValueError(f"should be 1 to {_MOST} devices, given {text!r}")
    return [known_device(known[found[2].casefold()], precision)] * count


def _of_file(file: Path, precision: Precision) -> list[Device]:
    values = _read(file)
    devices: list[Device] = []
    problems: list[str] = []
    for i, value in enumerate(values):
        where = f"device {i}"
        try:
            devices += _counted(value, precision) if isinstance(value, str) else [_entry(value, where, file)]
        except ValidationError as error:
            problems += described(error, value, partial(_allowed, value), where)
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise ConfigurationError(file, problems)
    return devices


def _allowed(value: Any, path: Sequence[str | int]) -> list[str]:
    return allowed_keys(DeviceEntry, tuple(path), value)


def _read(file: Path) -> list[Any]:
    values = read_values(file)
    if not isinstance(values, list) or not values:
        what = f"holds a {type(values).__name__}" if values else "is empty"
        raise ConfigurationError(file, [f"{what}; expected a list of devices, each a name such as H100 or a mapping"])
    return values


def _entry(value: Any, name: str, file: Path) -> Device:
    if not isinstance(value, dict):
        keys = ", ".join(DeviceEntry.model_fields)
        raise ValueError(f"should be a name such as H100, or a mapping with the keys {keys}, given {shown(value)}")
    entry = DeviceEntry.model_validate_json(json.dumps(value, default=str), strict=True)
    try:
        memory = size_in_bytes(entry.memory)
    except ValueError as error:
        raise ValueError(f"memory: {error}") from None
    link = Link(entry.link.latency, entry.link.bandwidth)
    return Device(name, memory, Speed(entry.flops, entry.bytes_per_second), link, str(file))


def size_in_bytes(size: str | int) -> int:
    """A size such as ``80GiB`` or a number of bytes.

    Raises:
        ValueError: It is not a size.
    """
    try:
        found = memory_bytes(size, 1)
    except (ValueError, TypeError) as error:
        raise ValueError(str(error).removeprefix("memory_limit ")) from None
    assert isinstance(found, int)
    return found


def local_devices(config: PipelineConfig) -> list[Device]:
    """The devices of this machine that ``pipeline.devices`` allows, each to hold one stage.

    A CPU counts as one device per ``pipeline.threads`` cores, without a limit of memory.

    Raises:
        ConfigurationError: A device cannot be used, or they are of several kinds.
    """
    names = [config.devices] if isinstance(config.devices, str) else config.devices or _present()
    devices = list(dict.fromkeys(map(torch.device, names)))
    if len({device.type for device in devices}) > 1:
        raise ConfigurationError(
            "pipeline.devices",
            [f"should be of one kind, of which one is measured, given {shown(names)}; or describe them for --devices"],
        )
    if devices[0].type == "cpu":
        cpu = Device("cpu", None, source=f"pipeline.threads: {config.threads}")
        return [cpu] * max(1, _cores() // config.threads)
    return [Device(str(device), _memory(device)) for device in devices]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _present() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]


def _memory(device: torch.device) -> int:
    try:
        return int(torch.accelerator.get_memory_info(device)[1])
    except Exception as error:  # each backend raises its own
        first_line = str(error).partition("\n")[0]
        raise ConfigurationError("pipeline.devices", [f"'{device}' cannot be used here: {first_line}"]) from error
