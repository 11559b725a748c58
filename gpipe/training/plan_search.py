"""Every sensible (stages, chunks), divided as well as can be: what fits, fastest first, and what does not and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from gpipe.partitioning.infeasible import Infeasible
from gpipe.partitioning.partition import Partition
from gpipe.partitioning.problem import Link
from gpipe.partitioning.solve import solve
from gpipe.tied import tied_parameters
from gpipe.training.config import PipelineConfig
from gpipe.training.hardware import Device
from gpipe.training.plan_costs import Costs, CostSource
from gpipe.training.plan_refusals import Refusal, counted, lacking_memory, lacking_more
from gpipe.training.plan_workload import Workload

_EVERY_STAGE_COUNT = 8  # up to so many devices; beyond, powers of two are enough to choose from
_CHUNKS_PER_STAGE = 8  # leaves a bubble of a tenth; more are tried only where memory asks for them


@dataclass(frozen=True)
class Found:
    """What a search found: partitions, fastest first, and what was refused."""

    choices: list[Partition]
    refusals: list[Refusal]


def search(
    workload: Workload,
    devices: Sequence[Device],
    costs: CostSource,
    *,
    own: PipelineConfig,
    static_bytes_per_param: float,
) -> Found:
    """Solve for every number of stages and of micro-batches worth a look.

    Args:
        workload: The model and a mini-batch.
        devices: In order; fewer stages take the first ones.
        costs: By number of micro-batches.
        own: The configuration's choice, tried too.
        static_bytes_per_param: See `solve`.

    Raises:
        RunError: The model cannot be estimated or measured.
    """
    cells = len(workload.cells)
    stages = stage_counts(min(len(devices), cells), own.stages)
    usual, more = chunk_counts(workload.rows, stages[-1], own.chunks)
    found = Found([], [])
    for count in sorted({own.stages, len(devices)} - set(range(stages[-1] + 1))):
        few = f"{counted(cells, 'cell')} and {counted(len(devices), 'device')}"
        found.refusals.append(Refusal(count, usual[0], f"there are only {few}, and a stage takes one of each"))
    misfits = dict.fromkeys(stages, 0)  # by number of stages, the most chunks known not to fit
    for chunks in [*usual, *more]:
        if found.choices and chunks in more:
            break
        # The inputs of a mini-batch stay the same, all else grows with its micro-batches: fewer chunks need more.
        found.refusals.extend(lacking_more(k, chunks, misfits[k]) for k in stages if chunks < misfits[k])
        left = [k for k in stages if chunks > misfits[k]]
        known = costs(chunks) if left else None
        for k in left:
            outcome = _outcome(workload, devices[:k], chunks, known, static_bytes_per_param)
            if isinstance(outcome, Partition):
                found.choices.append(outcome)
            else:
                found.refusals.append(outcome)
                misfits[k] = chunks if outcome.lacks_memory else misfits[k]
    found.choices.sort(key=lambda choice: (choice.seconds, len(choice.stages), choice.micro_batches))
    return found


def _outcome(
    workload: Workload, devices: Sequence[Device], chunks: int, costs: Costs | None, static: float
) -> Partition | Refusal:
    """The best division among all of ``devices``."""
    stages = len(devices)
    if costs is None:
        return Refusal(stages, chunks, "not measured: it would take more than a minute")
    try:
        partition = solve(
            costs.cells,
            stages,
            micro_batches=chunks,
            memory_limit=[device.memory for device in devices],
            static_bytes_per_param=static,
            links=links_between(devices),
            device_speeds=costs.device_speeds[:stages],
            input_bytes=workload.input_bytes(chunks),
        )
        ends = list(accumulate(partition.balance, initial=0))
        tied_parameters([workload.cells[first:end] for first, end in pairwise(ends)])
    except Infeasible as error:
        return lacking_memory(stages, chunks, error)
    except ValueError as error:  # modules that two stages of the fastest division share
        return Refusal(stages, chunks, str(error))
    return partition


def stage_counts(most: int, own: int) -> list[int]:
    """Numbers of stages to try, up to ``most``; with many devices powers of two, ``most`` and the ``own``."""
    if most <= _EVERY_STAGE_COUNT:
        return list(range(1, most + 1))
    return sorted({2**i for i in range(most.bit_length())} | {most, min(own, most)})


def chunk_counts(rows: int, stages: int, own: int) -> tuple[list[int], list[int]]:
    """Numbers of micro-batches to try: the ``own`` and those usual for so many stages, and more for want of memory.

    They are about a factor of two apart and divide the rows where that can be: uneven micro-batches waste time. The
    own comes first, then from many to few, which is from quickly measured to slowly.
    """
    own = min(own, rows)
    counts = sorted({_near(2**i, rows) for i in range(rows.bit_length())} | {rows})
    usual = [count for count in counts if count <= _CHUNKS_PER_STAGE * stages and count != own]
    return [own, *reversed(usual)], [count for count in counts if count > max([own, *usual])]


def _near(count: int, rows: int) -> int:
    """The divisor of ``rows`` next to ``count`` if one is near, else ``count``."""
    divisors = [n for n in range(math.ceil(0.75 * count), min(math.ceil(1.5 * count), rows + 1)) if rows % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / count)), default=count)


def links_between(devices: Sequence[Device]) -> list[Link] | None:
    """Of neighbours, each as slow as the slower of its two ends; None if messages take no time."""
    ends = [device.link for device in devices]
    return [
        Link(max(a.latency, b.latency), min(a.bandwidth, b.bandwidth)) for a, b in pairwise(ends) if a and b
    ] or None
