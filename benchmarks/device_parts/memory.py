"""Parts that count bytes: predicted beside the allocator's, and the largest model under a cap."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.device_parts.bench import Bench, CannotRun, encoder, in_turns, part
from benchmarks.device_parts.speed import stepped
from benchmarks.language_loss import WithLoss
from gpipe.models.transformer import gpipe_table1
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.partitioning.solve import predict

MEGA = 2**20


def convolutions(count: int) -> nn.Sequential:
    """Convolution, normalisation and ReLU, so many times."""
    torch.manual_seed(0)
    block = partial(nn.Conv2d, 64, 64, 3, padding=1)
    return nn.Sequential(*(nn.Sequential(block(), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(count)))


@part(90)
def bytes_and_seconds(bench: Bench) -> None:
    """Bytes and seconds as profile and predict say, beside the allocator's and the clock's."""
    warm_libraries(bench)
    rows, count, chunks = bench.size((32, 8, 8), (8, 4, 4))
    width, sequence, side = bench.size((1024, 512, 56), (64, 8, 8))
    models: dict[str, tuple[Callable[[], nn.Sequential], Tensor]] = {
        "Transformer": (partial(encoder, count, width), torch.randn(rows, sequence, width)),
        "convolutions": (partial(convolutions, count), torch.randn(rows, 64, side, side)),
    }
    for name, (make, x) in models.items():
        start = time.perf_counter()
        costs = profile(make(), x, device=bench.device, chunks=chunks)
        bench.say(model=name, profile_seconds=time.perf_counter() - start)
        for keep in (0, chunks // 2, chunks):
            predicted = predict(
                costs,
                [count],
                micro_batches=chunks,
                keep=keep,
                input_bytes=x.nbytes // chunks,
                static_bytes_per_param=2.0,
            )
            measured, ms = step_costs(bench, make(), x, chunks, keep)
            bench.say(
                model=name,
                keep=keep,
                predicted_MiB=predicted.bytes[0] / MEGA,
                measured_MiB=measured / MEGA,
                bytes_over=predicted.bytes[0] / measured,
                predicted_ms=1e3 * predicted.seconds,
                measured_ms=ms,
                seconds_over=1e3 * predicted.seconds / ms,
            )


def warm_libraries(bench: Bench) -> None:
    """Let the libraries take their workspaces, in this thread and in autograd's: they are nobody's."""
    a = torch.randn(64, 64, device=bench.device, requires_grad=True)
    (a @ a).sum().backward()  # type: ignore[no-untyped-call]
    bench.synchronize()


def step_costs(bench: Bench, module: nn.Sequential, x: Tensor, chunks: int, keep: int) -> tuple[int, float]:
    """Bytes that a step on one stage takes at its peak, parameters included, and its milliseconds."""
    pipe = gpipe.GPipe(module, [len(module)], devices=[bench.device], chunks=chunks, checkpoint=keep)
    x = x.to(bench.device)
    step = partial(stepped, pipe, x, x, nn.MSELoss(), "gpipe")
    step()
    pipe.zero_grad()
    gc.collect()
    bench.synchronize()
    before = torch.accelerator.memory_allocated(bench.device)
    torch.accelerator.reset_peak_memory_stats(bench.device)
    step()
    bench.synchronize()
    held = torch.accelerator.max_memory_allocated(bench.device) - before
    times = in_turns(bench, {"step": step}, rounds=bench.size(3, 1))["step"]
    return held + sum(p.nbytes for p in pipe.parameters()), times.ms


# --- GPipe's Table 1 --------------------------------------------------------------------------------------------------

CAP = 16 * 10**9  # bytes: an accelerator of the paper


@part(90)
def cap(bench: Bench) -> None:
    """GPipe's Table 1: the largest Transformer that trains in 16 GB on one device, as predicted and as run."""
    if bench.device.type != "cuda":
        raise CannotRun(
            f"needs CUDA, which can cap what its allocator takes; this is a device of type {bench.device.type}"
        )
    whole = torch.cuda.get_device_properties(bench.device).total_memory
    if whole < CAP:
        raise CannotRun(f"needs a device of {CAP / 1e9:g} GB or more, this one has {whole / 1e9:.1f}")
    torch.cuda.set_per_process_memory_fraction(CAP / whole)
    torch.set_float32_matmul_precision("high")
    for count in (11, 12, 13):
        chunks = 32
        said = predict(
            table1_costs(count), [count + 2], micro_batches=chunks, keep=0, static_bytes_per_param=3.0, input_bytes=8192
        ).bytes[0]
        error = ""
        try:
            train_table1(bench, count, chunks)
        except torch.OutOfMemoryError as raised:
            error = "; ".join([str(raised).split(". ")[0], *getattr(raised, "__notes__", ())])[:240]
        peaks = (
            torch.accelerator.max_memory_allocated(bench.device),
            torch.accelerator.max_memory_reserved(bench.device),
        )
        gc.collect()
        torch.accelerator.empty_cache()
        left = torch.accelerator.memory_allocated(bench.device)
        torch.accelerator.reset_peak_memory_stats(bench.device)
        bytes_ = {"predicted": said, "allocated": peaks[0], "reserved": peaks[1], "left_afterwards": left}
        bench.say(layers=count, cap=CAP, trains=not error, **bytes_, error=error)


def table1_costs(count: int) -> list[CellCost]:
    """Costs of a Transformer of the table with so many layers, for one text; its seconds are not asked for."""
    with torch.device("meta"):
        *cells, head = gpipe_table1(1)
        module = nn.Sequential(*cells, WithLoss(head))
        first, layer, last = estimate(module, torch.zeros(1, 1024, dtype=torch.long), speed=Speed(1e12, 1e12))
    return [first, *[layer] * count, last]


def train_table1(bench: Bench, count: int, chunks: int) -> None:
    """Two steps of SGD with momentum, everything recomputed."""
    with torch.device("meta"):
        *cells, head = gpipe_table1(count)
    model = nn.Sequential(*cells, WithLoss(head)).to_empty(device=bench.device)
    for p in model.parameters():
        nn.init.normal_(p, std=0.01)
    pipe = gpipe.GPipe(model, [count + 2], devices=[bench.device], chunks=chunks, checkpoint="always")
    optimizer = torch.optim.SGD(pipe.parameters(), 1e-4, momentum=0.9)
    x = torch.randint(1000, (chunks, 1024), device=bench.device)
    for _ in range(2):
        optimizer.zero_grad()
        pipe.train_step(x, x, lambda out, _: out.mean(), loss_over="micro_batch")
        optimizer.step()
        bench.synchronize()
