"""What the cells cost with so many micro-batches: estimated for named devices, measured on those of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import torch

from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.training.errors import RunError
from gpipe.training.factory import located
from gpipe.training.hardware import Device
from gpipe.training.plan_workload import Workload

_BUDGET = 60.0  # seconds of measuring, in all
_REPEATS = 3


@dataclass(frozen=True)
class Costs:
    """Costs of all cells for one micro-batch on the first device, and how fast every device is beside it."""

    cells: list[CellCost]
    device_speeds: tuple[float, ...]


class CostSource(Protocol):
    """Gives costs by the number of micro-batches; None where that would take too long."""

    def __call__(self, chunks: int) -> Costs | None:
        """The costs with ``chunks`` micro-batches."""


class Estimated:
    """Costs from shapes and what the devices sustain; nothing is computed.

    Args:
        workload: The model and a mini-batch.
        devices: Each with its speed.
    """

    def __init__(self, workload: Workload, devices: Sequence[Device]) -> None:
        self._workload, self._devices = workload, devices

    def __call__(self, chunks: int) -> Costs:
        """Estimate once for every kind of device.

        Raises:
            RunError: A cell needs values, not only shapes.
        """
        speeds = [device.speed for device in self._devices if device.speed is not None]
        kinds = {speed: self._of(speed, chunks) for speed in dict.fromkeys(speeds)}
        first = kinds[speeds[0]]
        return Costs(first, tuple(_seconds(first) / _seconds(kinds[speed]) for speed in speeds))

    def _of(self, speed: Speed, chunks: int) -> list[CellCost]:
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._workload.bfloat16, cache_enabled=False):
                return estimate(self._workload.module, self._workload.sample, speed=speed, chunks=chunks)
        except Exception as error:  # whatever the user's cells raise
            hint = "if the model computes with values, leave --devices out: costs are then measured"
            raise _failed(error, "estimated from shapes alone", hint) from error


class Measured:
    """Costs measured on a device of this machine, with the threads a stage will have.

    Args:
        workload: The model, with weights, and a mini-batch.
        devices: All alike; the first is measured.
        tell: Told what is being measured.
    """

    def __init__(self, workload: Workload, devices: Sequence[Device], tell: Callable[[str], None]) -> None:
        self._workload, self._devices, self._tell = workload, devices, tell
        self._spent = self._last = 0.0

    def __call__(self, chunks: int) -> Costs | None:
        """Measure, unless that would take the whole beyond a minute; fewer chunks are expected to take longer.

        Raises:
            RunError: A cell fails.
        """
        if self._spent + 2 * self._last > _BUDGET:
            return None
        name = self._devices[0].name
        rows = -(-self._workload.rows // chunks)
        self._tell(f"measuring {len(self._workload.cells)} cells on {name}: chunks {chunks}, {rows} rows each")
        began = perf_counter()
        cells = self._profile(torch.device(name), chunks)
        self._last = perf_counter() - began
        self._spent += self._last
        return Costs(cells, (1.0,) * len(self._devices))

    def _profile(self, device: torch.device, chunks: int) -> list[CellCost]:
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=self._workload.bfloat16, cache_enabled=False):
                return profile(
                    self._workload.module,
                    self._workload.sample,
                    device=device,
                    chunks=chunks,
                    repeats=_REPEATS,
                    company=len(self._devices) - 1,
                )
        except Exception as error:  # whatever the user's cells raise
            raise _failed(error, f"measured on {device}", "does it train with gpipe train?") from error


def _seconds(cells: Sequence[CellCost]) -> float:
    return sum(cell.forward_seconds + cell.backward_seconds for cell in cells)


def _failed(error: Exception, how: str, hint: str) -> RunError:
    notes = "".join(f"; {note.removeprefix('gpipe: ')}" for note in getattr(error, "__notes__", ()))
    return RunError(f"the model cannot be {how}: {located(error)}{notes}; {hint}")
