"""The tables of GPipe and torchgpipe beside what ``estimate`` and ``simulate`` say of the same models and devices.

Run: python -m benchmarks.paper_tables
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.harness import Result, report
from gpipe import schedules, simulate
from gpipe.costs import Link, divided_costs
from gpipe.models.amoebanet import amoebanet_d
from gpipe.models.resnet import resnet
from gpipe.models.transformer import gpipe_table1
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.partition import Partition
from gpipe.partitioning.solve import Infeasible, predict, solve
from gpipe.training.hardware import EFFICIENCY, LATENCY, Facts, known_device

QUESTION = (
    "How near do estimate and simulate come to the tables in GPipe's and torchgpipe's papers, and why not nearer?"
)
PAPERS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "gpipe_paper.yaml").read_text())

_P100 = Facts(9.3e12, None, 16 * 10**9, 0.732e12, 16e9, "NVIDIA P100 data sheet, PCIe 3.0 x16")
_P40 = Facts(11.76e12, None, 24 * 10**9, 0.346e12, 16e9, "NVIDIA P40 data sheet, PCIe 3.0 x16")
STATIC = 3.0  # 12 bytes a parameter in float32: parameter, gradient, one number of the optimizer
GB, GIB = 10**9, 2**30


def _gpu(facts: Facts) -> tuple[Speed, Link]:
    """At the share of the peaks that ``gpipe plan`` assumes."""
    assert facts.float32 is not None
    speed = Speed(EFFICIENCY * facts.float32, EFFICIENCY * facts.bytes_per_second)
    return speed, (LATENCY, EFFICIENCY * facts.link)


def _tpu() -> tuple[Speed, Link]:
    device = known_device("TPUv3-core", "bfloat16")
    assert device.speed is not None
    assert device.link is not None
    return device.speed, (device.link.latency, device.link.bandwidth)


# --- costs of the papers' models --------------------------------------------------------------------------------------


class _WithLoss(nn.Module):
    """A language model's last cell and its loss, by micro-batch: no stage holds the logits of the whole mini-batch."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, inputs: Any) -> Tensor:
        logits = self.head(inputs).flatten(0, 1)
        targets = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = nn.functional.cross_entropy(logits, targets, reduction="none")
        return loss.view(inputs[0].shape[:2]).mean(1)


@cache
def amoebanet(layers: int, filters: int, speed: Speed, rows: int = 1) -> list[CellCost]:
    """The costs of AmoebaNet-D's cells for a micro-batch of so many images of 224 x 224."""
    with torch.device("meta"):
        module = amoebanet_d(layers, filters)
        return estimate(module, torch.empty(rows, 3, 224, 224), speed=speed)


@cache
def resnet101(speed: Speed, rows: int) -> list[CellCost]:
    """The costs of its cells for so many images of 224 x 224."""
    with torch.device("meta"):
        return estimate(resnet("resnet101"), torch.empty(rows, 3, 224, 224), speed=speed)


@cache
def _transformer_cells(speed: Speed) -> tuple[CellCost, CellCost, CellCost]:
    """Embedding, layer and output layer, for one text."""
    with torch.device("meta"):
        *cells, head = gpipe_table1(2)
        module = nn.Sequential(*cells, _WithLoss(head))
        first, layer, _, last = estimate(module, torch.zeros(1, 1024, dtype=torch.long), speed=speed)
    return first, layer, last


def transformer(layers: int, speed: Speed) -> list[CellCost]:
    """The costs of a Transformer of GPipe's Table 1 with so many layers, for one text."""
    first, layer, last = _transformer_cells(speed)
    return [first, *[layer] * layers, last]


def parameters(costs: Sequence[CellCost]) -> int:
    """How many a model has."""
    return sum(c.parameter_bytes for c in costs) // 4


# --- memory -----------------------------------------------------------------------------------------------------------


def _fitting(costs: Sequence[CellCost], stages: int, micro_batches: int, limit: int) -> Partition | None:
    try:
        return solve(
            costs, stages, micro_batches=micro_batches, keep=0, static_bytes_per_param=STATIC, memory_limit=limit
        )
    except Infeasible:
        return None


def _activations(plan: Partition) -> int:
    """Bytes of all stages together beside their parameters'."""
    return sum(stage.bytes - stage.static_bytes for stage in plan.stages)


def _rows_meant(plan: Partition, printed_gb: float) -> str:
    """How many rows a micro-batch would have to have for a paper's bytes of activations, by our count.

    Boundaries stay the same, all else grows with the rows.
    """
    boundaries = sum(stage.input_bytes + stage.output_bytes for stage in plan.stages)
    return f"{(printed_gb * GB - boundaries) / (_activations(plan) - boundaries):.1f}"


def amoebanet_memory() -> Result:
    """GPipe's Table 1, the half for AmoebaNet-D."""
    table, rows = PAPERS["gpipe_table1_amoebanet"], []
    speed, _ = _tpu()
    for i, column in enumerate(table["columns"]):
        layers, filters = table["layers_filters"][i]
        costs = amoebanet(layers, filters, speed)
        kind, stages = column.rsplit("-", 1)
        held, meant = f"{128 * sum(c.activation_bytes for c in costs) / GB:.2f}", "-"
        plan = _fitting(costs, int(stages), 128, table["accelerator_memory_gb"] * GB)
        if kind == "pipeline":
            shown = plan or solve(costs, int(stages), micro_batches=128, keep=0, static_bytes_per_param=STATIC)
            held = f"{_activations(shown) / GB:.2f}"
            meant = _rows_meant(shown, table["peak_activation_gb"][i])
        rows.append(
            [
                column,
                f"({layers}, {filters})",
                f"{table['params'][i] / 1e6:,.0f} M",
                f"{parameters(costs) / 1e6:,.1f} M",
                f"{table['param_memory_gb'][i]:.2f}",
                f"{12 * parameters(costs) / GB:.2f}",
                f"{table['peak_activation_gb'][i]:.2f}",
                held,
                meant,
                "-" if kind == "naive" else f"{max(plan.bytes) / GB:.2f}" if plan else "does not fit",
            ]
        )
    columns = (
        "column|(L, D)|paper: parameters|ours|paper: their memory, GB|ours|paper: activations, GB|ours|fullest of 8 GB"
    ).split("|")
    note = (
        "Parameters agree but for the rounding of the paper's, whose last column has 24.62 GB for 1.8 G parameters, "
        "13.7 bytes each and not 12. Activations are those of all accelerators together, batch 128, all recomputed. "
        "The paper does not print M; ours is 128, one image a micro-batch, the least there can be. What is recomputed "
        "one micro-batch at a time grows with its images, the boundaries do not: the column before the last says how "
        "many images would explain the paper's bytes. The naive column cannot be batch 128: PyTorch keeps 0.33 GB an "
        "image in float32, so 6.26 GB are 19 images. Estimated, not run; XLA fuses operators whose results PyTorch "
        "keeps."
    )
    return Result("GPipe, Table 1: AmoebaNet-D on accelerators of 8 GB (estimated)", columns, rows, note)


def largest(stages: int, limit: int, speed: Speed) -> int:
    """The most Transformer layers that fit, each stage ``limit`` bytes."""
    low, high = 0, 20 * stages + 20
    while low < high:
        middle = (low + high + 1) // 2
        fits = _fitting(transformer(middle, speed), stages, 32, limit) is not None
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def transformer_memory(stages: Sequence[int] | None = None) -> Result:
    """GPipe's Table 1, the half for the Transformer; ``stages`` picks rows."""
    table, rows = PAPERS["gpipe_table1_transformer"], []
    limit, (speed, _) = table["accelerator_memory_gb"] * GB, _tpu()
    for i, column in enumerate(table["columns"]):
        kind, count = column.rsplit("-", 1)
        if stages is not None and int(count) not in stages:
            continue
        layers = table["layers"][i]
        costs = transformer(layers, speed)
        memory, activations = table["param_memory_gb"][i], table["peak_activation_gb"][i]
        if kind == "naive":
            held, meant = f"{32 * sum(c.activation_bytes for c in costs) / GB:,.1f}", "-"
        else:
            same = solve(costs, int(count), micro_batches=32, keep=0, static_bytes_per_param=STATIC)
            held, meant = f"{_activations(same) / GB:,.1f}", _rows_meant(same, activations)
        most = largest(int(count), limit, speed) if kind == "pipeline" else None
        plan = None if most is None else _fitting(transformer(most, speed), int(count), 32, limit)
        rows.append(
            [
                column,
                f"{layers:,}",
                f"{table['params'][i] / 1e6:,.1f} M",
                f"{parameters(costs) / 1e6:,.1f} M",
                f"{memory:,.1f}",
                f"{12 * parameters(costs) / GB:,.1f}",
                f"{activations:,.1f}",
                held,
                meant,
                "-" if most is None else f"{most:,}",
                "-" if plan is None else f"{max(plan.bytes) / GB:.2f}",
            ]
        )
    columns = (
        "column|layers|paper: parameters|ours|paper: their memory, GB|ours|paper: activations, GB|ours|texts a "
        "micro-batch, for the paper's|layers that fit here|fullest of 16 GB"
    ).split("|")
    note = (
        "Batch 32 as 32 micro-batches of one text, float32, all recomputed, the loss by micro-batch in the last "
        "stage. Parameters agree to the digits printed; their memory in the paper is 11.2 bytes each, in ours 12, and "
        "naive-1's two memory cells look exchanged. Activations: as above, the column before the last but one says "
        "how many texts a micro-batch would explain the paper's. We fit more layers than the paper because our "
        "micro-batches are the smallest. Estimated, not run; without a fragmenting allocator, and with no room for "
        "XLA's temporaries."
    )
    return Result("GPipe, Table 1: Transformer on accelerators of 16 GB (estimated)", columns, rows, note)


def torchgpipe_memory() -> Result:
    """Torchgpipe's memory benchmark, with its own partitions."""
    table, rows = PAPERS["torchgpipe_amoebanet_d_memory"], []
    speed, _ = _gpu(_P40)
    for i, column in enumerate(table["columns"]):
        layers, filters = table["layers_filters"][i]
        costs = amoebanet(layers, filters, speed)
        balance = table["balance"][i]
        plan = predict(costs, balance, micro_batches=128, keep=0, static_bytes_per_param=STATIC, input_bytes=602_112)
        rows.append(
            [
                column,
                f"({layers}, {filters})",
                " ".join(map(str, balance)),
                f"{table['model_gib'][i]:.2f}",
                f"{12 * parameters(costs) / GIB:.2f}",
                f"{table['peak_activation_gib'][i]:.2f}",
                f"{_activations(plan) / GIB:.2f}",
            ]
        )
    columns = "column|(L, D)|balance|model, GiB|ours|peak activations, GiB|ours".split("|")
    note = (
        "Batch 128 as 128 micro-batches; sums over the stages. The model's bytes agree to the digits. Activations: "
        "what CUDA's allocator rounds up and cells' workspaces in cuDNN are not in an estimate, and torchgpipe keeps "
        "the last micro-batch's activations (except_last) while it already holds the gradients of the outputs."
    )
    return Result("torchgpipe: memory of AmoebaNet-D (estimated)", columns, rows, note)


# --- speed ------------------------------------------------------------------------------------------------------------


def throughput(
    costs: Sequence[CellCost],
    stages: int,
    micro_batches: int,
    link: Link,
    keep: int = 0,
    balance: Sequence[int] | None = None,
    on_demand: bool = False,
) -> float:
    """Micro-batches a second of GPipe's schedule.

    Args:
        costs: Of one micro-batch, cell by cell.
        stages: K.
        micro_batches: M.
        link: Between two stages.
        keep: Micro-batches that are not recomputed.
        balance: None finds our own.
        on_demand: Recompute nothing before the gradient has come; needs ``keep=0``.
    """
    wire = link if stages > 1 else None
    if balance is None:
        balance = solve(costs, stages, micro_batches=micro_batches, keep=keep, links=wire).balance
    schedule = schedules.gpipe(stages=stages, micro_batches=micro_batches)
    if on_demand:
        costs = [replace(c, backward_seconds=c.forward_seconds + c.backward_seconds) for c in costs]
    else:
        schedule = schedules.with_recompute(schedule, keep)
    return micro_batches / simulate(schedule, divided_costs(costs, balance), wire).makespan


def table2() -> Result:
    """GPipe's Table 2: throughput on TPUs."""
    table, rows = PAPERS["gpipe_table2_throughput"], []
    speed, link = _tpu()
    models = {"amoebanet_d_18_256": amoebanet(18, 256, speed), "transformer_48": transformer(48, speed)}
    for name, costs in models.items():
        bases = [throughput(costs, 2, 1, link, on_demand=late) for late in (True, False)]
        for m, paper in table[name].items():
            row = [f"{name}, M={m}"]
            for k, printed in zip(table["stages"], paper, strict=True):
                late, early = (
                    throughput(costs, k, m, link, on_demand=on_demand) / base
                    for on_demand, base in zip((True, False), bases, strict=True)
                )
                row.append(f"{printed:g} / {late:.2f} / {early:.2f} / {k * m / (m + k - 1):.2f}")
            rows.append(row)
    note = (
        "Each cell: paper / simulated, recompute when the gradient has come / simulated, recompute while waiting for "
        "it (what we do) / bound of equal stages, all over K = 2, M = 1. Recompute while waiting costs nothing at M = "
        "1, so the base is higher and its ratios lower, though no step is slower. Every micro-batch is as large as "
        "any other here; the paper adapted the batch to each cell, so that some of its cells are above the bound, and "
        "smaller micro-batches use the matrix units worse, which an estimate at one efficiency does not know. "
        "AmoebaNet-D stays further below its simulation than the Transformer: the paper blames its uneven cells, of "
        "which our partition makes the best that estimated seconds allow."
    )
    title = "GPipe, Table 2: normalised training throughput on TPUs (simulated)"
    return Result(title, ["model", *(f"K={k}" for k in table["stages"])], rows, note)


def table3() -> Result:
    """GPipe's Table 3: GPUs without fast links."""
    table, rows = PAPERS["gpipe_table3_no_fast_links"], []
    speed, link = _gpu(_P100)
    through_host = (2 * link[0], link[1] / 2)
    models = {"amoebanet_d_18_128": amoebanet(18, 128, speed), "transformer_24": transformer(24, speed)}
    for name, costs in models.items():
        for words, wire in (("direct", link), ("through the host", through_host)):
            base = throughput(costs, 2, 32, wire)
            ours = [throughput(costs, k, 32, wire) / base for k in (2, 4, 8)]
            rows.append([f"{name}, {words}", *(f"{p:g} / {o:.2f}" for p, o in zip(table[name], ours, strict=True))])
    note = (
        "Each cell: paper / simulated, over K = 2; P100, M = 32, all recomputed. Messages take half of PCIe's peak, "
        "directly or by way of the host's memory. The bound of equal stages is 1.89 and 3.38. AmoebaNet-D lies "
        "between the two ways. The Transformer's messages are small beside its layers; at K = 8 ours is slower "
        "because stem and output layer, as dear as a layer here, make 26 cells for 8 stages, one of which has four."
    )
    return Result("GPipe, Table 3: P100 GPUs over PCI-E (simulated)", ["model", "K=2", "K=4", "K=8"], rows, note)


def torchgpipe_speed() -> Result:
    """Torchgpipe's speed of AmoebaNet-D, with its partitions and with ours."""
    entries, rows = PAPERS["torchgpipe_amoebanet_d_18_256"], []
    speed, link = _gpu(_P40)
    bases = None
    for entry in entries:
        k, m, balance = entry["stages"], entry["micro_batches"], entry["balance"]
        size = entry["batch"] // m
        costs = amoebanet(18, 256, speed, size)
        theirs, ours = (size * throughput(costs, k, m, link, keep=1, balance=b) for b in (balance, None))
        bases = bases or (entry["samples_per_s"], theirs)
        rows.append(
            [
                f"{k}, {m}, {entry['batch']}",
                " ".join(map(str, balance)),
                f"{entry['samples_per_s']:.1f}",
                f"{theirs:.1f}",
                f"{entry['samples_per_s'] / bases[0]:.2f}",
                f"{theirs / bases[1]:.2f}",
                f"{ours / theirs:.3f}",
            ]
        )
    columns = "K, M, batch|balance|measured, 1/s|simulated, 1/s|measured, ratio|simulated, ratio|our partition".split(
        "|"
    )
    note = (
        "P40 at half of its peaks, samples a second; ratios are to the first row; the last column is our partition's "
        "simulated speed over that of torchgpipe's, which was balanced for seconds measured on P40, not for these "
        "estimates: to them its early stages are too full, since grouped convolutions over many pixels and few "
        "filters move much memory, which the estimate counts for every operator. Larger micro-batches also use a GPU "
        "better (ratios that grow faster with M when measured), which one efficiency for all sizes leaves out."
    )
    return Result("torchgpipe: speed of AmoebaNet-D (18, 256) on P40 (simulated)", columns, rows, note)


def resnet_speed() -> Result:
    """Torchgpipe's speed of ResNet-101."""
    rows = []
    speed, link = _gpu(_P40)
    base = None
    for name, batch, m, measured, ratio, paper in PAPERS["torchgpipe_resnet101_speed"]:
        size = batch // m
        stages = 1 if name == "baseline" else int(name.rsplit("-", 1)[1])
        costs = resnet101(speed, size)
        ours = size * throughput(costs, stages, m, link, keep=1)
        base = base or ours
        rows.append(
            [
                f"{name}, batch {batch}, M={m}",
                f"{measured:.1f}",
                f"{ours:.1f}",
                f"{paper:.2f}",
                f"{ratio:.2f}",
                f"{ours / base:.2f}",
            ]
        )
    columns = "devices|torchgpipe, samples/s|simulated|GPipe's ratio|torchgpipe's ratio|simulated ratio".split("|")
    note = (
        "Simulated with our partition and at one efficiency for every size of micro-batch, so the ratios are what "
        "balance, bubble and links leave: an upper bound of what was measured."
    )
    return Result("torchgpipe: speed of ResNet-101 on P40 (simulated)", columns, rows, note)


# --- report -----------------------------------------------------------------------------------------------------------


def draw() -> Figure:
    """Throughput over K, papers and simulation."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 3)
    speed, link = _tpu()
    stages = PAPERS["gpipe_table2_throughput"]["stages"]
    models = {"amoebanet_d_18_256": amoebanet(18, 256, speed), "transformer_48": transformer(48, speed)}
    for ax, (name, costs) in zip(axes, models.items(), strict=False):
        base = throughput(costs, 2, 1, link)
        for color, (m, paper) in zip(("C0", "C1", "C2"), PAPERS["gpipe_table2_throughput"][name].items(), strict=True):
            ax.plot(stages, paper, color=color, marker="o", label=f"M={m}, paper")
            ours = [throughput(costs, k, m, link) / base for k in stages]
            ax.plot(stages, ours, color=color, linestyle="--", label=f"M={m}, simulated")
        ax.set(title=f"GPipe, Table 2: {name}", xlabel="stages", ylabel="throughput over K=2, M=1", xticks=stages)
        ax.legend(fontsize="small")
    entries = PAPERS["torchgpipe_amoebanet_d_18_256"]
    speed, link = _gpu(_P40)
    for color, m in zip(("C0", "C1", "C2"), (1, 4, 32), strict=True):
        mine = [e for e in entries if e["micro_batches"] == m]
        measured = [e["samples_per_s"] for e in mine]
        axes[2].plot(stages, measured, color=color, marker="o", label=f"M={m}, measured")
        ours = []
        for e in mine:
            size = e["batch"] // m
            ours.append(size * throughput(amoebanet(18, 256, speed, size), e["stages"], m, link, 1, e["balance"]))
        axes[2].plot(stages, ours, color=color, linestyle="--", label=f"M={m}, simulated")
    axes[2].set(title="torchgpipe: AmoebaNet-D (18, 256), P40", xlabel="stages", ylabel="samples/s", xticks=stages)
    axes[2].legend(fontsize="small")
    return figure


def main() -> None:
    """Estimate, simulate and report."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    tables = [
        amoebanet_memory(),
        torchgpipe_memory(),
        transformer_memory(),
        table2(),
        table3(),
        torchgpipe_speed(),
        resnet_speed(),
    ]
    report("paper_tables", tables, {}, figure=draw())


if __name__ == "__main__":
    main()
