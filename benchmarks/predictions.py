"""Does a run take the seconds and the bytes that were predicted for it?"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.harness import Result, Samples, interleave, steady, timed
from gpipe.partitioning.alone import alone
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.partition import Partition
from gpipe.partitioning.profile import profile
from gpipe.partitioning.sample import first_micro_batch
from gpipe.partitioning.solve import predict, solve
from gpipe.partitioning.timing import Seconds, in_company, rounds

STAGES = 2


def transformer(width: int = 256, layers: int = 8) -> nn.Sequential:
    """Even: encoder layers, all alike."""
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers))
    )


def convolutions() -> nn.Sequential:
    """Uneven: as in AmoebaNet, ever fewer pixels and more filters."""
    widths = [3, 32, 32, 64, 64, 128, 128, 128]
    cells = []
    for i in range(len(widths) - 1):
        stride = 2 if i in (2, 4) else 1
        cells.append(
            nn.Sequential(
                nn.ReLU() if i else nn.Identity(),
                nn.Conv2d(widths[i], widths[i + 1], 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i + 1]),
            )
        )
    return nn.Sequential(*cells, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)))


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "even Transformer": (transformer, (16, 128, 256)),
    "uneven convolutions": (convolutions, (32, 3, 64, 64)),
}


def _measured_costs(module: nn.Module, x: Tensor, chunks: int) -> list[CellCost]:
    return profile(module, x, chunks=chunks, repeats=5, company=STAGES - 1)


def _pipe(module: nn.Module, plan: Partition) -> gpipe.GPipe:
    """One intra-op thread a stage."""
    torch.set_num_threads(STAGES)
    pipe = gpipe.GPipe(
        module, plan.balance, devices=["cpu"] * STAGES, chunks=plan.micro_batches, checkpoint=list(plan.keep)
    )
    torch.set_num_threads(1)
    return pipe


def _step(pipe: gpipe.GPipe, x: Tensor, optimizer: torch.optim.Optimizer | None = None) -> None:
    pipe.zero_grad()
    outputs = pipe(x)
    outputs.square().mean().backward()
    if optimizer is not None:
        optimizer.step()


class _Profiled:
    """Costs of a net's cells, timed in every round of the benchmark, so that cells and steps meet the same machine."""

    def __init__(self, module: nn.Module, x: Tensor, chunks: int) -> None:
        self._costs = profile(module, x, chunks=chunks, repeats=1)
        self._company = alone(cells_of(module)), first_micro_batch(x, chunks)
        self._timer = rounds(*self._company, x.device)
        self._rounds: list[list[Seconds]] = []

    def measure(self) -> None:
        """One more round; the first of several passes brings the memory back that others used meanwhile."""
        with in_company(STAGES - 1, *self._company):
            self._rounds.append(list(islice(self._timer, 3))[-1])

    def costs(self) -> list[CellCost]:
        """Medians over the rounds."""
        return [
            replace(
                cost,
                forward_seconds=statistics.median(s.forward for s in seconds),
                backward_seconds=statistics.median(s.backward for s in seconds),
            )
            for cost, seconds in zip(self._costs, zip(*self._rounds, strict=True), strict=True)
        ]


def predicted_seconds(count: int) -> tuple[Result, dict[str, Samples]]:
    """Forward and backward of a mini-batch in two stages."""
    torch.set_num_threads(1)
    contenders: dict[str, Callable[[], float]] = {}
    settled: dict[str, tuple[_Profiled, Partition]] = {}
    for net, (make, shape) in NETS.items():
        x = torch.randn(shape)
        for chunks in (4, 8):
            profiled = _Profiled(make(), x, chunks)
            contenders[f"cells of {net}, M={chunks}"] = timed(profiled.measure)
            for keep in (chunks, 0):
                module = make()
                plan = solve(_measured_costs(module, x, chunks), STAGES, micro_batches=chunks, keep=keep)
                name = f"{net}, M={chunks}, {'all kept' if keep else 'all recomputed'}"
                settled[name] = profiled, plan
                contenders[name] = steady(partial(_step, _pipe(module, plan), x))
    samples = interleave(contenders, count)
    rows = []
    for name, (profiled, plan) in settled.items():
        found = predict(profiled.costs(), plan.balance, micro_batches=plan.micro_batches, keep=plan.keep)
        measured = samples[name].median
        error = f"{100 * (found.seconds / measured - 1):+.1f} %"
        rows.append([name, "+".join(map(str, plan.balance)), f"{found.seconds:.3f}", f"{measured:.3f}", error])
    columns = ["net", "balance", "predicted s", "measured s", "predicted / measured - 1"]
    note = "Cells are measured while another thread runs them too: stages share the machine's memory and caches."
    return Result("Seconds a step, two stages on two cores", columns, rows, note), samples


def _peaks(pipe: gpipe.GPipe, x: Tensor) -> list[int]:
    """Bytes each stage holds at its peak, in the second step with Adam."""
    optimizer = torch.optim.Adam(pipe.parameters())
    _step(pipe, x, optimizer)
    with gpipe.record(pipe, memory=True) as timeline:
        _step(pipe, x, optimizer)
    state = [2 * sum(p.nbytes for cell in stage.cells for p in cell.parameters()) for stage in pipe._stages]
    gc.collect()
    return [size + peak for size, peak in zip(state, timeline.peak_bytes, strict=True)]


def predicted_bytes() -> Result:
    """Peak bytes of every stage."""
    torch.set_num_threads(1)
    rows = []
    for net, (make, shape) in NETS.items():
        x = torch.randn(shape)
        for chunks, keep in ((8, 0), (8, 4), (8, 8)):
            module = make()
            costs = _measured_costs(module, x, chunks)
            plan = solve(costs, STAGES, micro_batches=chunks, keep=keep, input_bytes=x.nbytes // chunks)
            measured = _peaks(_pipe(module, plan), x)
            for k in range(STAGES):
                rows.append(
                    [
                        f"{net}, M={chunks}, keep={keep}, stage {k}",
                        f"{plan.bytes[k] / 2**20:.2f}",
                        f"{measured[k] / 2**20:.2f}",
                        f"{100 * (plan.bytes[k] / measured[k] - 1):+.2f} %",
                    ]
                )
    columns = ["net", "predicted MiB", "measured MiB", "predicted / measured - 1"]
    note = "Counted storages, with parameters and Adam's state; boundaries copied as if every stage had its own device."
    return Result("Peak bytes of every stage", columns, rows, note)


def auto_keep(count: int) -> tuple[Result, dict[str, Samples]]:
    """At a cap halfway between keep=0 and keep=M: checkpoint="auto" against "always"."""
    torch.set_num_threads(1)
    contenders: dict[str, Callable[[], float]] = {}
    about: dict[str, tuple[gpipe.GPipe, int, Tensor]] = {}
    for net, (make, shape) in NETS.items():
        x = torch.randn(shape)
        chunks = 8
        costs = _measured_costs(make(), x, chunks)
        inputs = x.nbytes // chunks
        balance = solve(costs, STAGES, micro_batches=chunks, input_bytes=inputs).balance
        ends = [predict(costs, balance, micro_batches=chunks, keep=q, input_bytes=inputs) for q in (0, chunks)]
        limit = sum(max(end.bytes) for end in ends) // 2
        for checkpoint in ("always", "auto"):
            torch.set_num_threads(STAGES)
            pipe = gpipe.GPipe(
                make(),
                devices=["cpu"] * STAGES,
                chunks=chunks,
                sample=x,
                memory_limit=limit,
                checkpoint=checkpoint,  # type: ignore[arg-type]
            )
            torch.set_num_threads(1)
            name = f"{net}, {checkpoint}"
            contenders[name] = steady(partial(_step, pipe, x))
            about[name] = (pipe, limit, x)
    samples = interleave(contenders, count)
    rows = []
    for name, (pipe, limit, x) in about.items():
        base = samples[f"{name.split(', ')[0]}, always"].median
        keep: Any = pipe.partition.keep if pipe.partition else ()
        rows.append(
            [
                name,
                f"{limit / 2**20:.1f}",
                " ".join(map(str, keep)),
                f"{max(_peaks(pipe, x)) / 2**20:.1f}",
                f"{samples[name].median:.3f}",
                f"{base / samples[name].median:.3f}",
            ]
        )
    columns = [
        "net, checkpoint",
        "limit MiB",
        "kept of 8",
        "measured peak MiB",
        "seconds a step",
        "speed-up over always",
    ]
    return Result("A byte cap halfway between keep=0 and keep=M, two stages on two cores", columns, rows), samples
