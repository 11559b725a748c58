"""Parts that time: stages that share a device, an action, launching from threads, seeding, alignment."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.contenders import accumulate
from benchmarks.device_parts.bench import Bench, Times, in_turns, part
from benchmarks.models import NETS
from benchmarks.sharing import PRECISIONS, Setting, Step, piped, plain

CHUNKS = 8
PLAIN = "plain loop"


def ways(cells: int) -> dict[str, Callable[[Setting], Step]]:
    """Contenders on a net of so many cells that are all alike."""

    def ours(stages: int, schedule: str, checkpoint: str) -> Callable[[Setting], Step]:
        balance = [cells // stages] * stages
        return partial(piped, stages=stages, schedule=schedule, checkpoint=checkpoint, balance=balance)

    return {
        PLAIN: partial(plain, recompute=False),
        "K=1 gpipe": ours(1, "gpipe", "never"),
        "K=1 1F1B": ours(1, "one_f_one_b", "never"),
        "K=2 gpipe": ours(2, "gpipe", "never"),
        "K=2 1F1B": ours(2, "one_f_one_b", "never"),
        "K=4 gpipe": ours(4, "gpipe", "never"),
        "K=4 1F1B": ours(4, "one_f_one_b", "never"),
        "plain loop, checkpoint a cell": partial(plain, recompute=True),
        "K=1 gpipe, always": ours(1, "gpipe", "always"),
        "K=2 gpipe, except_last": ours(2, "gpipe", "except_last"),
    }


@part(130)
def speed(bench: Bench) -> None:
    """Stages that share the device beside plain PyTorch with the same micro-batches, at a size that fills it."""
    net = bench.size(NETS["accelerator"], NETS["tiny"])["Transformer"]
    chunks = bench.size(CHUNKS, 4)
    bench.say(net=net.about, micro_batches=chunks)
    for precision in ("bfloat16", "float32"):
        setting = Setting(net, chunks, bench.device, PRECISIONS[precision])
        steps = {way: make(setting) for way, make in ways(len(net.made()[0])).items()}
        if precision == "bfloat16":
            steps["plain loop, weights in bfloat16"] = cast(setting)
        found = in_turns(bench, steps, rounds=bench.size(4, 1), warm=bench.size(2, 1))
        for way, times in found.items():
            bench.say(precision=precision, way=way, **row(times, found[PLAIN], net.rows))
        del steps
        gc.collect()
        torch.accelerator.empty_cache()


def row(times: Times, base: Times, rows: int) -> dict[str, float]:
    """Numbers of one contender."""
    return {
        "ms": times.ms,
        "least_ms": min(times.done),
        "most_ms": max(times.done),
        "launch_ms": times.launch_ms,
        "samples_per_second": 1e3 * rows / times.ms,
        "over_plain": times.over(base),
        "step_MiB": times.taken / 2**20,
    }


def cast(setting: Setting) -> Step:
    """The plain loop with all in bfloat16, beside which autocast casts weights for each micro-batch."""
    module, loss = setting.made()
    x, y = (t.to(torch.bfloat16) for t in setting.batch)
    return accumulate(module.to(torch.bfloat16), x, y, setting.chunks, loss)


@part(60)
def actions(bench: Bench) -> None:
    """Microseconds of an action: cells too small to matter, beside plain PyTorch."""
    micro_batches = bench.size(16, 4)
    x, y = torch.randn(2, 64, 64, device=bench.device)
    loss = nn.MSELoss()
    for cells in (4, 32):
        model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(cells))).to(bench.device)
        steps: dict[str, Callable[[], object]] = {PLAIN: accumulate(model, x, y, micro_batches, loss)}
        counts = {}
        for stages in (1, 2, 4):
            options: dict[str, Any] = {
                "devices": [bench.device] * stages,
                "chunks": micro_batches,
                "checkpoint": "never",
            }
            pipe = gpipe.GPipe(model, [cells // stages] * stages, **options)
            for schedule in ("gpipe", "one_f_one_b"):
                way = f"K={stages} {schedule}"
                steps[way], counts[way] = partial(stepped, pipe, x, y, loss, schedule), 2 * micro_batches * stages
        found = in_turns(bench, steps, rounds=bench.size(20, 2))
        for way, count in counts.items():
            over = 1e3 * (found[way].ms - found[PLAIN].ms) / count
            times = {"ms": found[way].ms, "launch_ms": found[way].launch_ms, "plain_ms": found[PLAIN].ms}
            bench.say(cells=cells, way=way, actions=count, us_an_action=over, **times)


def stepped(pipe: gpipe.GPipe, x: Tensor, y: Tensor, loss: nn.Module, schedule: str) -> None:
    """One step, without the optimizer's."""
    pipe.zero_grad()
    pipe.train_step(x, y, loss, loss_over="micro_batch", schedule=schedule)


@part(40)
def threads(bench: Bench) -> None:
    """How launching scales over 1 to 8 threads of one interpreter: a stream each, kernels too small to matter."""
    count = bench.size(100, 3)
    x = torch.randn(2, 8, 64, device=bench.device)
    for workers in (1, 2, 4, 8):
        models = [
            nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True).to(bench.device) for _ in range(workers)
        ]
        bench.synchronize()
        for what, backward in (("forward", False), ("forward and backward", True)):
            launch(models[0], x, 5, backward)
            bench.synchronize()
            running = [threading.Thread(target=launch, args=(model, x, count, backward)) for model in models]
            start = time.perf_counter()
            for thread in running:
                thread.start()
            for thread in running:
                thread.join()
            launched = time.perf_counter() - start
            bench.synchronize()
            done = time.perf_counter() - start
            layers = count * workers
            bench.say(threads=workers, what=what, layers_per_second=layers / launched, done_per_second=layers / done)


def launch(model: nn.Module, x: Tensor, count: int, backward: bool) -> None:
    """Launch a layer so many times, on a stream of this thread's own."""
    before, own = torch.accelerator.current_stream(x.device), torch.Stream(x.device)
    own.wait_event(before.record_event())
    with own:
        for _ in range(count):
            y = model(x)
            if backward:
                y.sum().backward()
    before.wait_event(own.record_event())


@part(25)
def generators(bench: Bench) -> None:
    """Microseconds of what seeding and ordering take on the host."""
    count = bench.size(2000, 10)
    (default, *_) = torch.get_device_module(bench.device).default_generators
    stream, state = torch.accelerator.current_stream(bench.device), default.get_state()
    recorded = stream.record_event()
    calls: dict[str, Callable[[], object]] = {
        "manual_seed": lambda: default.manual_seed(5),
        "get_state": default.get_state,
        "set_state": lambda: default.set_state(state),
        "get_offset": default.get_offset,
        "new generator": lambda: torch.Generator(bench.device),
        "record_event": stream.record_event,
        "event with time": lambda: torch.Event(bench.device, enable_timing=True).record(),
        "wait_event": lambda: stream.wait_event(recorded),
    }
    for what, call in calls.items():
        try:
            call()
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            bench.say(what=what, cannot=f"{type(error).__name__}: {error}".splitlines()[0][:120])
            continue
        start = time.perf_counter()
        for _ in range(count):
            call()
        bench.say(what=what, us=1e6 * (time.perf_counter() - start) / count)


SHAPES = ((64, 256, 256), (37, 512, 512), (500, 1024, 4096), (4096, 1024, 1024), (8, 4096, 1000))


@part(30)
def alignment(bench: Bench) -> None:
    """Whether a product's bits depend on where its input starts: copies must keep what they depend on."""
    for dtype in (torch.float32, torch.bfloat16):
        for shift in (16, 64, 128, 256):
            other = [shape for shape in bench.size(SHAPES, SHAPES[:2]) if shifted_differs(bench, dtype, shift, *shape)]
            bench.say(dtype=str(dtype), bytes=shift, shapes=len(SHAPES), other_bits=other)


def shifted_differs(bench: Bench, dtype: torch.dtype, shift: int, rows: int, width: int, outputs: int) -> bool:
    """Whether the same product has other bits where its input starts ``shift`` bytes after the allocator's start."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": bench.device, "dtype": dtype}
    weight, bias = torch.randn(outputs, width, **options), torch.randn(outputs, **options)
    values, memory = torch.randn(rows, width, **options), torch.empty(rows * width + 512, **options)
    found = []
    for start in (0, shift // memory.element_size()):
        x = memory[start:][: rows * width].view(rows, width).copy_(values)
        found.append(nn.functional.linear(x, weight, bias))
    return not torch.equal(*found)
