"""``gpipe simulate``: a step of a configuration under any schedule, predicted without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpipe import schedules
from gpipe.costs import StageCost, divided_costs
from gpipe.partitioning.partition import Partition
from gpipe.partitioning.solve import solve
from gpipe.partitioning.units import readable_bytes, readable_seconds
from gpipe.settings import kept_micro_batches
from gpipe.simulate import simulate
from gpipe.timeline import Timeline
from gpipe.training.build import Plan
from gpipe.training.errors import ConfigurationError
from gpipe.training.hardware import Device
from gpipe.training.logs import tell
from gpipe.training.plan_costs import Costs, CostSource, Estimated, Measured
from gpipe.training.plan_devices import local_devices, named_devices
from gpipe.training.plan_search import links_between
from gpipe.training.plan_workload import make_workload, static_bytes


@dataclass(frozen=True)
class Simulated:
    """One schedule and its predicted step.

    Attributes:
        name: Of the schedule.
        timeline: None where there is no such schedule for these stages.
        reason: Why not.
    """

    name: str
    timeline: Timeline | None
    reason: str = ""


@dataclass(frozen=True)
class Simulation:
    """What was simulated, and on what it rests.

    Attributes:
        partition: The cells' division, the best under GPipe's schedule.
        rows: Rows of a mini-batch.
        keep: Per stage the micro-batches that keep their activations.
        results: One per schedule.
    """

    partition: Partition
    rows: int
    keep: tuple[int, ...]
    results: list[Simulated]


def simulate_pipeline(
    plan: Plan,
    *,
    names: Sequence[str],
    stages: int | None,
    chunks: int | None,
    devices: str | None,
    say: Callable[[str], None],
) -> Simulation:
    """Predict a step of a configuration.

    Args:
        plan: The checked configuration.
        names: Of schedules; none for all.
        stages: Number of stages; None for the configuration's.
        chunks: Number of micro-batches; None for the configuration's.
        devices: Such as ``8xH100``, or a YAML file; None: as many as there are stages of this machine's first device,
            whose costs are then measured.
        say: Told what is being measured.

    Raises:
        ConfigurationError: An option or the configuration is wrong.
        RunError: The model cannot be estimated or measured.
    """
    configuration = plan.configuration
    config = configuration.pipeline
    stages = config.stages if stages is None else stages
    wanted = [_known(name) for name in names] or list(schedules.BUILDERS)
    found = _devices(plan, devices, stages)
    workload = make_workload(plan, allocate=devices is None)
    if stages > len(workload.cells):
        raise ConfigurationError("--stages", [f"expected at most {len(workload.cells)}, the cells, given {stages}"])
    micro_batches = min(config.chunks if chunks is None else chunks, workload.rows)
    source: CostSource = Measured(workload, found, say) if devices is None else Estimated(workload, found)
    costs = source(micro_batches)
    if costs is None:
        raise ConfigurationError("--chunks", ["measuring would take more than a minute: name devices to estimate for"])
    keep = _keep(config.checkpoint, config.stages, stages, micro_batches)
    static, _ = static_bytes(configuration.optimizer)
    partition = solve(
        costs.cells,
        stages,
        micro_batches=micro_batches,
        keep=keep,
        static_bytes_per_param=static,
        links=links_between(found),
        device_speeds=costs.device_speeds[:stages],
        input_bytes=workload.input_bytes(micro_batches),
    )
    per_stage = _stage_costs(costs, partition)
    arguments = {"input_bytes": workload.input_bytes(micro_batches), "static_bytes_per_param": static}
    results = [_simulated(name, keep, micro_batches, per_stage, links_between(found), arguments) for name in wanted]
    return Simulation(partition, workload.rows, keep, results)


def _known(name: str) -> str:
    try:
        schedules.builder(name)
    except ValueError as error:
        raise ConfigurationError("--schedule", [str(error)]) from None
    return name


def _devices(plan: Plan, devices: str | None, stages: int) -> list[Device]:
    configuration = plan.configuration
    if devices is None:
        return [local_devices(configuration.pipeline)[0]] * stages
    found = named_devices(devices, configuration.training.precision)
    if len(found) < stages:
        raise ConfigurationError("--devices", [f"expected at least {stages}, one a stage, given {len(found)}"])
    return found[:stages]


def _keep(checkpoint: Any, own: int, stages: int, micro_batches: int) -> tuple[int, ...]:
    if isinstance(checkpoint, list) and own != stages:
        raise ConfigurationError(
            "pipeline.checkpoint",
            [f"is for {own} stages, but {stages} are to be simulated: --set pipeline.checkpoint=except_last, say"],
        )
    return kept_micro_batches(checkpoint, stages, micro_batches)


def _stage_costs(costs: Costs, partition: Partition) -> list[StageCost]:
    scaled = divided_costs(costs.cells, partition.balance)
    return [
        replace(
            cost,
            forward_seconds=cost.forward_seconds / speed,
            input_gradient_seconds=cost.input_gradient_seconds / speed,
            weight_gradient_seconds=cost.weight_gradient_seconds / speed,
        )
        for cost, speed in zip(scaled, costs.device_speeds, strict=False)
    ]


def _simulated(
    name: str,
    keep: tuple[int, ...],
    micro_batches: int,
    costs: Sequence[StageCost],
    links: Any,
    arguments: dict[str, Any],
) -> Simulated:
    try:
        schedule = schedules.builder(name)(stages=len(costs), micro_batches=micro_batches)
    except ValueError as error:
        return Simulated(name, None, str(error))
    return Simulated(name, simulate(schedules.with_recompute(schedule, keep), costs, links, **arguments))


def report(simulation: Simulation, console: Console) -> None:
    """Print a table of the schedules, fastest first, and a picture of each."""
    done = sorted(
        ((result.name, result.timeline) for result in simulation.results if result.timeline is not None),
        key=lambda pair: pair[1].makespan,
    )
    partition = simulation.partition
    tell(
        console,
        f"{len(partition.stages)} stages of {' '.join(map(str, partition.balance))} cells, {partition.micro_batches} "
        f"micro-batches, kept per stage: {' '.join(map(str, simulation.keep))}; weights' gradients taken to be half of "
        "a backward",
    )
    columns = "schedule,workers,step,samples/s,bubble,recompute,peak,of stage".split(",")
    table = Table(*columns, box=SIMPLE_HEAD)
    for name, timeline in done:
        peak = max(timeline.peak_bytes)
        table.add_row(
            name,
            str(len(timeline.workers)),
            readable_seconds(timeline.makespan),
            f"{simulation.rows / timeline.makespan:,.0f}" if timeline.makespan else "-",
            f"{timeline.bubble:.1%}",
            f"{sum(timeline.recompute) / len(timeline.workers):.1%}",
            readable_bytes(peak),
            str(timeline.peak_bytes.index(peak)),
        )
    console.print(table)
    for name, timeline in done:
        tell(console, f"{name}\n{timeline.render(max(40, min(console.width, 140) - 24))}\n")
    for result in simulation.results:
        if result.timeline is None:
            tell(console, f"{result.name}: {result.reason}")


def as_json(simulation: Simulation) -> dict[str, Any]:
    """The same as plain data."""
    return {
        "balance": list(simulation.partition.balance),
        "chunks": simulation.partition.micro_batches,
        "keep": list(simulation.keep),
        "schedules": [
            {
                "name": result.name,
                "seconds": timeline.makespan,
                "bubble": timeline.bubble,
                "busy": list(timeline.busy),
                "recompute": list(timeline.recompute),
                "communication": list(timeline.communication),
                "peak_bytes": list(timeline.peak_bytes),
            }
            if (timeline := result.timeline)
            else {"name": result.name, "reason": result.reason}
            for result in simulation.results
        ],
    }
