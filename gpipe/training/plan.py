"""``gpipe plan``: the fastest ways to divide what a configuration trains among given devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gpipe.partitioning.partition import Partition
from gpipe.partitioning.units import readable_bytes
from gpipe.training.build import Plan
from gpipe.training.config import Configuration
from gpipe.training.errors import ConfigurationError
from gpipe.training.hardware import Device
from gpipe.training.plan_costs import CostSource, Estimated, Measured
from gpipe.training.plan_devices import local_devices, named_devices, size_in_bytes
from gpipe.training.plan_refusals import summary, would_do
from gpipe.training.plan_search import Found, search
from gpipe.training.plan_workload import Workload, make_workload, static_bytes


@dataclass(frozen=True)
class Planning:
    """Choices for a configuration, and what they rest on.

    Attributes:
        configuration: What is to be trained.
        devices: All that may be used, in order.
        measured: Whether costs were measured; if not, they were estimated from shapes.
        cells: Number of cells of the model.
        static_bytes_per_param: Bytes of parameter, gradient and optimizer state per byte of parameter.
        static_counted: Whether the optimizer's state was counted; if not, it was taken to be that of Adam.
        found: Choices, fastest first, at least one; and what was refused.
    """

    configuration: Configuration
    devices: list[Device]
    measured: bool
    cells: int
    static_bytes_per_param: float
    static_counted: bool
    found: Found

    @property
    def best(self) -> Partition:
        """The fastest."""
        return self.found.choices[0]

    def is_configured(self, stages: int, chunks: int) -> bool:
        """Whether the configuration has these stages and chunks now."""
        config, rows = self.configuration.pipeline, self.configuration.training.batch_size
        return (stages, chunks) == (config.stages, min(config.chunks, rows))


def plan_pipeline(plan: Plan, *, devices: str | None, memory: str | None, tell: Callable[[str], None]) -> Planning:
    """Find the best (stages, chunks, keep) for a configuration.

    Args:
        plan: The checked configuration.
        devices: Such as ``8xH100``, or a YAML file; None: those of this machine, on which costs are then measured.
        memory: What every device may hold, such as ``80GiB``; None: all it has.
        tell: Told what is being measured.

    Raises:
        ConfigurationError: An option or the configuration is wrong, or no choice fits the memory.
        RunError: The model cannot be estimated or measured.
    """
    configuration = plan.configuration
    if devices is None:
        found_devices = local_devices(configuration.pipeline)
    else:
        found_devices = named_devices(devices, configuration.training.precision)
    if memory is not None:
        found_devices = [replace(device, memory=_limit(memory)) for device in found_devices]
    workload = make_workload(plan, allocate=devices is None)
    costs: CostSource = (
        Measured(workload, found_devices, tell) if devices is None else Estimated(workload, found_devices)
    )
    static, counted = static_bytes(configuration.optimizer)
    found = search(workload, found_devices, costs, own=configuration.pipeline, static_bytes_per_param=static)
    if not found.choices:
        raise ConfigurationError(plan.source, [_nothing_fits(workload, found_devices, found)])
    return Planning(configuration, found_devices, devices is None, len(workload.cells), static, counted, found)


def _limit(memory: str) -> int:
    try:
        return size_in_bytes(memory)
    except ValueError as error:
        raise ConfigurationError("--memory", [str(error)]) from None


def _nothing_fits(workload: Workload, devices: list[Device], found: Found) -> str:
    lacking = [refusal for refusal in found.refusals if refusal.lacks_memory]
    if not lacking:
        return f"no choice is possible: {'; '.join(summary(found.refusals))}"
    sizes = sorted({device.memory for device in devices if device.memory is not None})  # not empty: memory lacks
    memory = " to ".join(readable_bytes(size) for size in dict.fromkeys([sizes[0], sizes[-1]]))
    stages, chunks = max(r.stages for r in lacking), max(r.chunks for r in lacking)
    return (
        f"no choice fits the memory: {len(workload.cells)} cells on up to {stages} devices of {memory}, with up to "
        f"{chunks} chunks of {workload.rows} rows. Would do: {would_do(lacking, alike=len(sizes) == 1)}"
    )
