"""How close does a two-stage CPU pipeline come to what two cores can do, and what does wrapping alone cost?

Run: python -m benchmarks.throughput [--rounds 5] [--chunks 4 8 16]
     python -m benchmarks.throughput --engine distributed [--against torch] ...   (see benchmarks/distributed.py)
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from time import perf_counter

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.harness import Result, interleave, own_process, report, timed

WIDTH, HEADS, FEED_FORWARD, SEQUENCE, BATCH, LAYERS = 512, 8, 2048, 128, 32, 8
CHUNKS = (4, 8, 16)
STAGES = 2


def layers(count: int) -> nn.Sequential:
    """Transformer encoder layers without dropout."""
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(WIDTH, HEADS, FEED_FORWARD, dropout=0.0, batch_first=True) for _ in range(count))
    )


def data() -> tuple[Tensor, Tensor]:
    """One mini-batch of inputs and targets, (BATCH, SEQUENCE, WIDTH) each."""
    torch.manual_seed(0)
    return torch.randn(BATCH, SEQUENCE, WIDTH), torch.randn(BATCH, SEQUENCE, WIDTH)


def accumulate(module: nn.Module, x: Tensor, y: Tensor, chunks: int) -> Callable[[], None]:
    """The plain loop: forward, loss and backward of each micro-batch, gradients accumulated."""

    def step() -> None:
        module.zero_grad()
        for part, target in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
            (nn.functional.mse_loss(module(part), target) / chunks).backward()

    return step


def piped(stages: int, x: Tensor, y: Tensor, chunks: int) -> Callable[[], None]:
    """A training step of a pipe that keeps all activations, one intra-op thread a stage."""
    torch.set_num_threads(stages)
    torch.manual_seed(0)
    pipe = gpipe.GPipe(
        layers(LAYERS), [LAYERS // stages] * stages, devices=["cpu"] * stages, chunks=chunks, checkpoint="never"
    )
    torch.set_num_threads(1)

    def step() -> None:
        pipe.zero_grad()
        pipe.train_step(x, y, nn.functional.mse_loss)

    return step


def _one_stage(pipe: Connection, first: bool) -> None:
    """A process that runs one stage on its own, as often as it is told to."""
    torch.set_num_threads(1)
    x, y = data()
    x.requires_grad_(not first)
    module = layers(LAYERS // STAGES)
    while (chunks := pipe.recv()) is not None:
        step = accumulate(module, x, y, chunks)
        start = perf_counter()
        step()
        pipe.send(perf_counter() - start)


class Ceiling:
    """Two processes, each running one stage at the same time without communication: no bubble, no messages."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        pairs = [spawn.Pipe() for _ in range(STAGES)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            spawn.Process(target=_one_stage, args=(theirs, k == 0), daemon=True) for k, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()
            own_process(process.pid or 0)

    def run(self, chunks: int) -> float:
        """Seconds until the slower of the two is done."""
        for pipe in self._pipes:
            pipe.send(chunks)
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=list(CHUNKS))
    parser.add_argument("--engine", choices=["threads", "distributed"], default="threads")
    parser.add_argument("--against", choices=["torch"], help="with --engine distributed: torch's pipeline runs too")
    given = parser.parse_args()
    if given.engine == "distributed":
        from benchmarks.distributed import compare

        return compare(given.against == "torch", given.rounds, given.chunks)
    if given.against:
        parser.error("--against torch compares ranks: give --engine distributed too")
    on_threads(given.rounds, given.chunks)


def on_threads(rounds: int, chunks: Sequence[int]) -> None:
    """Measure and report the pipeline on threads.

    Args:
        rounds: Counted rounds.
        chunks: Numbers of micro-batches.
    """
    torch.set_num_threads(1)
    x, y = data()
    plain = layers(LAYERS)
    ceiling = Ceiling()
    contenders: dict[str, Callable[[], float]] = {}
    for m in chunks:
        contenders[f"plain loop, M={m}"] = timed(accumulate(plain, x, y, m))
        contenders[f"GPipe K=1, M={m}"] = timed(piped(1, x, y, m))
        contenders[f"GPipe K=2, M={m}"] = timed(piped(2, x, y, m))
        contenders[f"ceiling, M={m}"] = lambda m=m: ceiling.run(m)  # type: ignore[misc]
    samples = interleave(contenders, rounds)
    ceiling.close()
    rows = []
    for m in chunks:
        loop, one, two, best = (
            samples[f"{name}, M={m}"].median for name in ("plain loop", "GPipe K=1", "GPipe K=2", "ceiling")
        )
        bound = best / (m / (m + STAGES - 1))
        rows.append(
            [
                str(m),
                *(f"{s:.3f}" for s in (loop, one, two, best)),
                f"{one / loop:.3f}",
                f"{loop / two:.2f}",
                f"{bound / two:.3f}",
            ]
        )
    columns = [
        "M",
        "plain loop s",
        "K=1 s",
        "K=2 s",
        "ceiling s",
        "K=1 / loop",
        "K=2 speed-up",
        "K=2 of ceiling x M/(M+1)",
    ]
    title = f"{LAYERS} Transformer layers, d {WIDTH}, sequence {SEQUENCE}, batch {BATCH}, one intra-op thread a stage"
    report("throughput", [Result(title, columns, rows)], samples)


if __name__ == "__main__":
    main()
