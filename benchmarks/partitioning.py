"""How good are the partitions, how fast is the solver, and does a run take the seconds and bytes it predicts?

Run: python -m benchmarks.partitioning [--chains 500] [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
from itertools import combinations, pairwise
from time import process_time
from typing import Any

import numpy as np

from benchmarks.block_partition import block_partition
from benchmarks.harness import Result, Samples, report
from benchmarks.predictions import auto_keep, predicted_bytes, predicted_seconds
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.solve import Infeasible, predict, solve

QUESTION = "How good are the partitions, how fast is the solver, and does a run take the seconds and bytes it predicts?"


def chain(rng: np.random.Generator, cells: int, spread: float = 0.7) -> list[CellCost]:
    """A random chain: log-normal seconds and bytes, backward about twice forward."""
    forward = rng.lognormal(0, spread, cells) * 1e-3
    backward = forward * rng.uniform(1.6, 2.4, cells)
    sizes = (rng.lognormal(0, 1, (cells, 4)) * [1e7, 1e6, 1e6, 1e6]).astype(int).tolist()
    return [CellCost(f"cell{i}", forward[i], backward[i], *sizes[i]) for i in range(cells)]


def _balances(cells: int, stages: int) -> list[list[int]]:
    divisions = combinations(range(1, cells), stages - 1)
    return [[b - a for a, b in pairwise((0, *cuts, cells))] for cuts in divisions]


def quality(chains: int) -> Result:
    """Seconds a step of each partitioner, over the best division of all."""
    rng = np.random.default_rng(0)
    names = ["gpipe.partitioning.solve", "block partition (torchgpipe)", "as many cells each"]
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(chains):
        stages = int(rng.integers(2, 6))
        cells, micro_batches = int(rng.integers(stages, 14)), int(rng.choice([1, 2, 4, 8, 16]))
        costs = chain(rng, cells)
        best = min(predict(costs, b, micro_batches=micro_batches).seconds for b in _balances(cells, stages))
        times = [c.forward_seconds + c.backward_seconds for c in costs]
        even = [cells // stages + (k < cells % stages) for k in range(stages)]
        found = [list(solve(costs, stages, micro_batches=micro_batches).balance), block_partition(times, stages), even]
        for name, balance in zip(names, found, strict=True):
            ratios[name].append(predict(costs, balance, micro_batches=micro_batches).seconds / best)
    rows = [
        [name, *(f"{100 * (x - 1):.2f} %" for x in (statistics.mean(r), float(np.quantile(r, 0.95)), max(r)))]
        for name, r in ratios.items()
    ]
    title = f"Predicted seconds a step above the best division's, {chains} random chains (to 13 cells, 5 stages)"
    return Result(title, ["partitioner", "mean", "95th percentile", "worst"], rows)


def quality_under_a_cap(chains: int) -> Result:
    """The same with a byte cap: how often a division that fits is found, and at what cost."""
    rng = np.random.default_rng(1)
    ratios, missed, none = [], 0, 0
    for _ in range(chains):
        stages = int(rng.integers(2, 5))
        cells, micro_batches = int(rng.integers(stages, 11)), int(rng.choice([2, 4, 8]))
        costs = chain(rng, cells)
        roomy = solve(costs, stages, micro_batches=micro_batches)
        tight = max(predict(costs, roomy.balance, micro_batches=micro_batches, keep=0).bytes)
        limit = int(rng.uniform(0.8, 1) * (tight + rng.uniform() * (max(roomy.bytes) - tight)))
        best = _best_under(costs, stages, micro_batches, limit)
        try:
            found = solve(costs, stages, micro_batches=micro_batches, memory_limit=limit).seconds
        except Infeasible:
            missed += best is not None
            none += best is None
            continue
        ratios.append(found / best if best else 1.0)
    row = [str(len(ratios)), f"{100 * (statistics.mean(ratios) - 1):.3f} %", f"{100 * (max(ratios) - 1):.3f} %"]
    columns = ["chains that fit", "mean above the best", "worst", "fits, but not found", "nothing fits"]
    return Result(f"The solver under a byte cap, {chains} random chains", columns, [[*row, str(missed), str(none)]])


def _best_under(costs: list[CellCost], stages: int, micro_batches: int, limit: int) -> float | None:
    """By trying every division, each with as many micro-batches kept as fit."""
    found = []
    for balance in _balances(len(costs), stages):
        keep = []
        by_keep = [predict(costs, balance, micro_batches=micro_batches, keep=q).bytes for q in range(micro_batches + 1)]
        for k in range(stages):
            fitting = [q for q, sizes in enumerate(by_keep) if sizes[k] <= limit]
            keep.append(fitting[-1] if fitting else -1)
        if min(keep) >= 0:
            found.append(predict(costs, balance, micro_batches=micro_batches, keep=keep).seconds)
    return min(found, default=None)


def speed() -> tuple[Result, dict[str, Samples]]:
    """Seconds of one core to solve large problems, with and without a cap."""
    rows, samples = [], {}
    for cells, stages, micro_batches in ((1000, 32, 128), (4000, 128, 512)):
        for capped in (False, True):
            seconds = Samples()
            gaps = []
            for seed in range(3):
                costs = chain(np.random.default_rng(seed), cells)
                limit = _halfway(costs, stages, micro_batches) if capped else None
                start = process_time()
                found = solve(costs, stages, micro_batches=micro_batches, memory_limit=limit)
                seconds.seconds.append(process_time() - start)
                seconds.foreign.append(0.0)
                gaps.append(found.seconds / (found.lower_bound or found.seconds) - 1)
            name = f"{cells} cells, {stages} stages, {micro_batches} micro-batches" + (", capped" if capped else "")
            samples[f"solve {name}"] = seconds
            rows.append([name, *(f"{s:.2f}" for s in seconds.seconds), f"{100 * max(gaps):.2f} %"])
    columns = ["problem", "seed 0, s", "seed 1, s", "seed 2, s", "largest gap to the bound"]
    note = (
        "CPU seconds of one core. The cap stands halfway between what keep=0 and keep=M of an uncapped solution need."
    )
    return Result("Time to solve", columns, rows, note), samples


def _halfway(costs: list[CellCost], stages: int, micro_batches: int) -> int:
    free = solve(costs, stages, micro_batches=micro_batches)
    bare = predict(costs, free.balance, micro_batches=micro_batches, keep=0)
    return (max(free.bytes) + max(bare.bytes)) // 2


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    samples: dict[str, Any] = {}
    results = [quality(arguments.chains), quality_under_a_cap(arguments.chains // 2)]
    solved, times = speed()
    results.append(solved)
    samples |= times
    results.append(predicted_bytes())
    for measure in (predicted_seconds, auto_keep):
        result, times = measure(arguments.rounds)
        results.append(result)
        samples |= times
    report("partitioning", results, samples)


if __name__ == "__main__":
    main()
