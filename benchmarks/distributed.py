"""How close do two ranks on gloo come to two busy cores, and how do they compare with torch's own pipeline?

Run: python -m benchmarks.throughput --engine distributed --against torch [--rounds 5] [--chunks 4 8 16]
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gpipe
from benchmarks.contenders import STAGES, accumulate
from benchmarks.harness import Result, interleave, own_process, ratio, report
from benchmarks.models import BATCH, FEED_FORWARD, LAYERS, SEQUENCE, WIDTH, data, layers
from benchmarks.namespaces import Host

QUESTION = "How close do two ranks on gloo come to two busy cores, and how do they compare with torch's own pipeline?"

LOOP, CEILING = "plain loop", "ceiling"
OURS = {"DistributedGPipe gpipe": "gpipe", "DistributedGPipe 1F1B": "one_f_one_b"}
TORCHS = {"torch ScheduleGPipe": "ScheduleGPipe", "torch Schedule1F1B": "Schedule1F1B"}

Step = Callable[[], Any]
Make = Callable[[int, Any, int], Step]


def _loop(rank: int, chunks: int) -> Step:
    """The whole model on rank 0 alone."""
    x, y = data()
    return accumulate(layers(LAYERS), x, y, chunks, nn.functional.mse_loss) if rank == 0 else lambda: None


def _ceiling(rank: int, chunks: int) -> Step:
    """Both ranks busy with their own stage: no bubble, no messages."""
    x, y = data()
    return accumulate(layers(LAYERS // STAGES), x.requires_grad_(rank > 0), y, chunks, nn.functional.mse_loss)


def piped(count: int, chunks: int, schedule: str) -> gpipe.DistributedGPipe:
    """So many layers as a pipeline of two ranks that keeps all activations, its loss by micro-batch."""
    return gpipe.DistributedGPipe(
        layers(count),
        [count // STAGES] * STAGES,
        chunks=chunks,
        loss_fn=nn.functional.mse_loss,
        loss_over="micro_batch",
        schedule=schedule,
        checkpoint="never",
        seed=0,
        device="cpu",
    )


def _ours(rank: int, chunks: int, schedule: str) -> Step:
    x, y = data()
    pipe = piped(LAYERS, chunks, schedule)

    def step() -> None:
        pipe.zero_grad()
        pipe.train_step(x, y)

    return step


def _torchs(rank: int, chunks: int, schedule: str) -> Step:
    from torch.distributed import pipelining

    x, y = data()
    module = layers(LAYERS // STAGES)
    stage = pipelining.PipelineStage(module, rank, STAGES, torch.device("cpu"))
    runs = getattr(pipelining, schedule)(stage, n_microbatches=chunks, loss_fn=nn.functional.mse_loss)

    def step() -> None:
        module.zero_grad()
        if rank == 0:
            runs.step(x, return_outputs=False)
        else:
            runs.step(target=y, losses=[], return_outputs=False)

    return step


def _made(rank: int, name: str, chunks: int) -> Step:
    if name in OURS:
        return _ours(rank, chunks, OURS[name])
    if name in TORCHS:
        return _torchs(rank, chunks, TORCHS[name])
    return (_loop if name == LOOP else _ceiling)(rank, chunks)


def _rank(rank: int, port: int, host: Host | None, make: Make, pipe: Connection) -> None:
    """A process that runs what it is told to: answers every (name, M) with seconds and result, or what went wrong."""
    torch.set_num_threads(1)
    if host is not None:
        host.enter()
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    os.environ["GLOO_SOCKET_IFNAME"] = loopback if host is None else host.interface
    address = "127.0.0.1" if host is None else host.first
    dist.init_process_group("gloo", f"tcp://{address}:{port}", rank=rank, world_size=STAGES)
    steps: dict[tuple[Any, int], Step] = {}
    with suppress(EOFError, BrokenPipeError):  # the parent is done with this world
        while True:
            contender = pipe.recv()
            try:
                if contender not in steps:
                    torch.manual_seed(0)
                    steps[contender] = make(rank, *contender)
                dist.barrier()
                start = perf_counter()
                result = steps[contender]()
                seconds = perf_counter() - start
                dist.barrier()
                pipe.send((seconds, result))
            except Exception:
                pipe.send(traceback.format_exc())
    os._exit(0)  # the other rank may be gone: no farewell


class Ranks:
    """A world of rank processes.

    Args:
        make: ``make(rank, name, chunks)`` gives, on a rank, a step to be timed, which returns what can be pickled. A
            name is anything that can be, and can be a key.
        hosts: Where each runs; None for this machine.
    """

    def __init__(self, make: Make, hosts: Sequence[Host | None] = (None,) * STAGES) -> None:
        spawn = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pipes, self._processes = [], []
        for rank, host in enumerate(hosts):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_rank, args=(rank, port, host, make, theirs), daemon=True)
            process.start()
            theirs.close()
            own_process(process.pid or 0)
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, name: Any, chunks: int) -> list[tuple[float, Any]]:
        """Every rank's seconds for one step, and what that returned."""
        for pipe in self._pipes:
            pipe.send((name, chunks))
        answers: dict[int, Any] = {}
        while len(answers) < STAGES:
            for pipe in wait([p for k, p in enumerate(self._pipes) if k not in answers]):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = self._pipes[rank].recv()
                if isinstance(answers[rank], str):  # the other may wait for it
                    raise RuntimeError(f"rank {rank} failed in {name}, M={chunks}:\n{answers[rank]}")
        return [answers[rank] for rank in range(STAGES)]

    def slowest(self, name: Any, chunks: int) -> float:
        """Seconds until the slower rank is done with one step."""
        return max(seconds for seconds, _ in self.run(name, chunks))

    def close(self) -> None:
        """End the processes, whatever they do."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()


def compare(against_torch: bool, rounds: int, chunks: Sequence[int]) -> None:
    """Measure and report.

    Args:
        against_torch: Whether torch's schedules run too.
        rounds: Counted rounds, of about 90 seconds for three numbers of micro-batches.
        chunks: Numbers of micro-batches.
    """
    pipes = [*OURS, *(TORCHS if against_torch else ())]
    turns = [(LOOP, chunks[0]), *((name, m) for m in chunks for name in [*pipes, CEILING])]
    ranks = Ranks(_made)
    try:
        samples = interleave({f"{name}, M={m}": partial(ranks.slowest, name, m) for name, m in turns}, rounds)
    finally:
        ranks.close()
    loop = samples[f"{LOOP}, M={chunks[0]}"].median
    rows = []
    for m in chunks:
        of = {name: samples[f"{name}, M={m}"] for name in [*pipes, CEILING]}
        bubble = (m + STAGES - 1) / m
        for ours, theirs in zip(OURS, TORCHS, strict=True):
            row = [str(m), ours, f"{of[ours].median:.3f}", f"{bubble * ratio(of[CEILING], of[ours]):.3f}"]
            row.append(f"{loop / of[ours].median:.2f}")
            if against_torch:
                row += [
                    f"{of[theirs].median:.3f}",
                    f"{bubble * ratio(of[CEILING], of[theirs]):.3f}",
                    f"{ratio(of[ours], of[theirs]):.3f}",
                ]
            rows.append([*row, f"{of[CEILING].median:.3f}"])
    columns = ["M", "pipeline", "s", "bound / s", "speed-up"]
    columns += ["torch's s", "bound / torch's s", "s / torch's s"] if against_torch else []
    title = (
        f"{LAYERS} Transformer layers, d {WIDTH}, feed-forward {FEED_FORWARD}, sequence {SEQUENCE}, batch {BATCH}; "
        f"{STAGES} ranks on gloo, one intra-op thread each"
    )
    note = (
        f"Bound: the ceiling (both ranks busy with their own stage, no messages) x (M+{STAGES - 1})/M. Speed-up: over "
        f"the plain loop on one rank, {loop:.3f} s with M={chunks[0]}. Torch's pipeline in each row has the same "
        "schedule. All contenders ran in turns in the same two processes; bound / s and s / torch's s are medians of "
        "the ratios within a round."
    )
    report("distributed", [Result(title, [*columns, "ceiling s"], rows, note)], samples)
