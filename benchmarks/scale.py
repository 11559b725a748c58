"""Pipelines of 2 to 1,024 devices over links from a data centre's to the internet's, simulated.

Run: python -m benchmarks.scale [--devices 8 64] [--chunks 128 1024]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from time import perf_counter

import torch
from matplotlib.figure import Figure

from benchmarks.harness import Result, Samples, report
from gpipe import Schedule, StageCost, schedules, simulate
from gpipe.costs import Link, divided_costs
from gpipe.models.transformer import gpipe_table1
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import estimate
from gpipe.training.hardware import known_device

QUESTION = "Up to how many devices, and over which links, does a pipeline pay, and which schedule and M win there?"

LAYERS, BATCH, HOST = 1024, 1024, 8  # layers; texts of 1,024 tokens a mini-batch; devices of a host
ACTION = 50e-6  # seconds to launch an action; assumed
LIMIT = 80 * 10**9
STATIC = 8.0  # 16 bytes a parameter of two: bfloat16 weights and gradients, Adam's state and a copy in float32
STAGES = (8, 16, 32, 64, 128, 256, 1024)
CHUNKS = (32, 128, 1024)
LINKS: Mapping[str, Link | None] = {
    "data centre (10 us, 400 Gbit/s)": (10e-6, 50e9),
    "metro (1 ms, 100 Gbit/s)": (1e-3, 12.5e9),
    "internet (40 ms, 1 Gbit/s)": (40e-3, 0.125e9),
}
NAMES = ("gpipe", "gpipe_zero_bubble", "one_f_one_b", "zero_bubble_h1", "interleaved_one_f_one_b")


@dataclass(frozen=True)
class Run:
    """One simulated step.

    Attributes:
        devices: How many.
        schedule: Its name.
        recomputes: All micro-batches, or none.
        chunks: M.
        seconds: Of the step.
        held: Bytes of the fullest device.
    """

    devices: int
    schedule: str
    recomputes: bool
    chunks: int
    seconds: float
    held: int


def cells() -> tuple[float, CellCost]:
    """Seconds of one device for a text in one layer, forward and backward; and the layer's cost, in bfloat16."""
    device = known_device("H100", "bfloat16")
    assert device.speed is not None
    with torch.device("meta"):
        _, layer, *_ = estimate(gpipe_table1(2), torch.zeros(1, 1024, dtype=torch.long), speed=device.speed)
    halved = replace(
        layer,
        activation_bytes=layer.activation_bytes // 2,
        boundary_bytes=layer.boundary_bytes // 2,
        parameter_bytes=layer.parameter_bytes // 2,
        workspace_bytes=layer.workspace_bytes // 2,
        kept_input_bytes=None,
        handed_on_bytes=layer.handed_on_bytes // 2,
    )
    return layer.forward_seconds + layer.backward_seconds, halved


def stage_cost(layer: CellCost, layers: int, rows: int) -> StageCost:
    """Of one stage for a micro-batch of so many texts: seconds and bytes grow with the rows, parameters do not."""
    one = divided_costs([layer] * layers, [layers])[0]
    return StageCost(
        forward_seconds=rows * one.forward_seconds + ACTION,
        input_gradient_seconds=rows * one.input_gradient_seconds + ACTION,
        weight_gradient_seconds=rows * one.weight_gradient_seconds + ACTION,
        activation_bytes=rows * one.activation_bytes,
        boundary_bytes=rows * one.boundary_bytes,
        parameter_bytes=one.parameter_bytes,
        workspace_bytes=rows * one.workspace_bytes,
    )


def wires(schedule: Schedule, between: Link | None, host: int = HOST) -> list[Link]:
    """The link of every two neighbouring stages: inside a host or between two."""
    device = known_device("H100", "bfloat16")
    assert device.link is not None
    inside = (device.link.latency, device.link.bandwidth)
    workers = len(schedule.workers)
    hosts = [stage % workers // host for stage in range(schedule.stages)]
    return [inside if a == b or between is None else between for a, b in pairwise(hosts)]


def built(name: str, devices: int, chunks: int) -> Schedule | None:
    """A schedule for so many devices, without recompute; None where it does not exist."""
    if name != "interleaved_one_f_one_b":
        return schedules.builder(name)(stages=devices, micro_batches=chunks)
    if chunks % devices or 2 * devices > LAYERS:
        return None
    return schedules.interleaved_one_f_one_b(2 * devices, chunks)


def swept(stages: Sequence[int], chunks: Sequence[int], layer: CellCost) -> dict[str, list[Run]]:
    """Every schedule, number of devices and of micro-batches, by kind of link."""
    runs: dict[str, list[Run]] = {name: [] for name in LINKS}
    for devices, m, name in product(stages, chunks, NAMES):
        plain = built(name, devices, m)
        if plain is None:
            continue
        cost = stage_cost(layer, LAYERS // plain.stages, BATCH // m)
        for recomputes, schedule in ((False, plain), (True, schedules.with_recompute(plain, 0))):
            for kind, between in LINKS.items():
                timeline = simulate(schedule, cost, wires(schedule, between), static_bytes_per_param=STATIC)
                held = max(memory.peak for memory in timeline.worker_memory)
                runs[kind].append(Run(devices, name, recomputes, m, timeline.makespan, held))
    return runs


def best(runs: Sequence[Run], devices: int) -> Run:
    """The fastest of so many devices that fits; the smallest, where none does."""
    mine = [run for run in runs if run.devices == devices]
    fitting = [run for run in mine if run.held <= LIMIT]
    return min(fitting, key=lambda run: run.seconds) if fitting else min(mine, key=lambda run: run.held)


def _named(run: Run) -> str:
    return f"{run.schedule}, {'all' if run.recomputes else 'nothing'} recomputed"


def winners(runs: Mapping[str, Sequence[Run]], work: float, stages: Sequence[int]) -> Result:
    """The best of every number of devices and kind of link."""
    rows = []
    for devices in stages:
        row = [f"{devices:,}"]
        for kind in runs:
            run = best(runs[kind], devices)
            speedup = work / run.seconds
            fits = "" if run.held <= LIMIT else f", {run.held / 10**9:,.0f} GB"
            row.append(f"{speedup:,.1f} ({speedup / devices:.0%}): {_named(run)}, M={run.chunks}{fits}")
        rows.append(row)
    title = f"The fastest that fits: speed-up over one device of endless memory ({LAYERS:,} layers, simulated)"
    note = (
        f"In brackets the share of the devices' arithmetic. The Transformer of GPipe's Table 1 with {LAYERS:,} layers, "
        f"{BATCH:,} texts of 1,024 tokens a step, H100 at half of its bfloat16 peak, {HOST} devices to a host, hosts "
        f"in a row joined by the links named; {1e6 * ACTION:.0f} us to launch an action; each schedule with and "
        "without recompute, of which only what fits 80 GB counts: where bytes stand beside a row, nothing fits. "
        "Embedding, output layer and optimizer are left out, stages are equal, links are each stage's own and neither "
        "fail nor jitter; interleaved needs M to be a multiple of the devices and two layers for each."
    )
    return Result(title, ["devices", *runs], rows, note)


def ends(runs: Mapping[str, Sequence[Run]], work: float, stages: Sequence[int]) -> Result:
    """Where more devices no longer pay."""
    rows = []
    for kind, found in runs.items():
        speedups = {k: work / run.seconds for k in stages if (run := best(found, k)).held <= LIMIT}
        if not speedups:
            rows.append([kind, "none fits", "none fits", "none"])
            continue
        top = max(speedups, key=lambda k: speedups[k])
        half = max((k for k, s in speedups.items() if s >= k / 2), default=None)
        rows.append([kind, f"{top:,}", f"{speedups[top]:,.1f}", "none" if half is None else f"{half:,}"])
    columns = [
        "link between hosts",
        "devices with the highest speed-up",
        "speed-up",
        "most at half of ideal or more",
    ]
    note = "Beyond the first number of devices a step takes longer than with fewer. Of the numbers of devices above."
    return Result("Where pipelines stop paying", columns, rows, note)


def schedules_table(runs: Mapping[str, Sequence[Run]], devices: int) -> Result:
    """Every schedule at one number of devices, at its best M, and at every M."""
    kind = next(iter(runs))
    mine = [run for run in runs[kind] if run.devices == devices]
    rows = [
        [_named(run), str(run.chunks), f"{run.seconds:.3f}", f"{run.held / 10**9:.1f}"]
        for run in sorted(mine, key=lambda run: run.seconds)
    ]
    title = f"Every schedule and M on {devices:,} devices, {kind}"
    return Result(title, ["schedule", "M", "seconds a step", "fullest device, GB"], rows)


def draw(runs: Mapping[str, Sequence[Run]], work: float, stages: Sequence[int]) -> Figure:
    """Speed-up over the number of devices, a curve a link; the marker says which schedule is best."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip(NAMES, "os^vD", strict=True))
    axes.plot(stages, stages, color="grey", linewidth=0.8, label="ideal")
    for kind, found in runs.items():
        fitting = [run for k in stages if (run := best(found, k)).held <= LIMIT]
        (line,) = axes.plot([r.devices for r in fitting], [work / r.seconds for r in fitting], label=kind)
        for r in fitting:
            axes.plot(r.devices, work / r.seconds, marker=markers[r.schedule], color=line.get_color())
            axes.annotate(
                f"M={r.chunks}",
                (r.devices, work / r.seconds),
                textcoords="offset points",
                xytext=(4, -9),
                fontsize="xx-small",
            )
    for name, marker in markers.items():
        axes.plot([], [], marker=marker, color="grey", linestyle="", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="devices, 8 to a host", ylabel="speed-up over one device", title="The fastest schedule, by link")
    axes.legend(fontsize="small")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=STAGES)
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNKS)
    given = parser.parse_args(argv)
    start = perf_counter()
    seconds, layer = cells()
    work = LAYERS * BATCH * seconds
    runs = swept(given.devices, given.chunks, layer)
    middle = given.devices[len(given.devices) // 2]
    tables = [winners(runs, work, given.devices), ends(runs, work, given.devices), schedules_table(runs, middle)]
    spent = Samples([perf_counter() - start], [0.0])
    report("scale", tables, {"all simulations": spent}, figure=draw(runs, work, given.devices))


if __name__ == "__main__":
    main()
