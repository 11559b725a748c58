"""How many cells each stage of a pipe gets, and how many micro-batches it keeps, where the user leaves that open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gpipe.microbatch import row_count
from gpipe.partitioning.partition import Partition
from gpipe.partitioning.profile import profile
from gpipe.partitioning.split import split_evenly
from gpipe.queueing import solve_with_queues
from gpipe.settings import Checkpoint, check_balance, check_checkpoint, check_devices, kept_micro_batches

MemoryLimit = int | str | Sequence[int | str]

_POWERS = {letter: power for power, letter in enumerate("KMGT", 1)}


@dataclass(frozen=True)
class Plan:
    """What was settled: cells per stage, checkpoint, and the partition they come from if they were computed."""

    balance: list[int]
    checkpoint: Checkpoint
    partition: Partition | None = None


def planned(
    module: nn.Module,
    cells: Sequence[tuple[str, nn.Module]],
    balance: Iterable[int] | None,
    devices: Any,
    chunks: int,
    checkpoint: Any,
    sample: Any,
    memory_limit: MemoryLimit | None,
) -> Plan:
    """Balance and checkpoint from the arguments of ``GPipe``: as given, measured, or by parameter count.

    Raises:
        TypeError, ValueError: They do not fit together, or no partition fits the memory.
    """
    if sample is None and (memory_limit is not None or checkpoint == "auto"):
        raise ValueError("memory_limit and checkpoint='auto' need a sample: give a mini-batch of inputs to measure")
    if checkpoint == "auto" and memory_limit is None:
        raise ValueError("checkpoint='auto' keeps what fits: give memory_limit, or checkpoint='never' to keep all")
    if sample is None:
        given = balance_by_parameters(cells, devices) if balance is None else check_balance(balance, len(cells))
        return Plan(given, checkpoint)
    if balance is not None:
        raise ValueError("balance is given, and sample to measure one: leave one of the two out")
    return balance_by_measurement(
        module,
        len(cells),
        devices=devices,
        sample=sample,
        chunks=chunks,
        checkpoint=checkpoint,
        memory_limit=memory_limit,
    )


def balance_by_parameters(cells: Sequence[tuple[str, nn.Module]], devices: Any) -> list[int]:
    """As many stages as there are devices, the largest as small as can be."""
    stages = stage_count(len(cells), devices)
    return split_evenly([sum(p.numel() for p in cell.parameters()) for _, cell in cells], stages) if cells else []


def stage_count(cells: int, devices: Any) -> int:
    """One stage a device: a given device needs a cell, one that is merely there does not.

    Raises:
        ValueError: More devices are given than there are cells.
    """
    count = len(check_devices(devices, None))
    if devices is None:
        return min(count, cells)
    if count > cells > 0:
        raise ValueError(f"{count} devices for {cells} cells: a stage needs at least one cell, so name at most {cells}")
    return count


def balance_by_measurement(
    module: nn.Module,
    cells: int,
    *,
    devices: Any,
    sample: Any,
    chunks: int,
    checkpoint: Any,
    memory_limit: MemoryLimit | None,
) -> Plan:
    """Profile the cells on ``sample`` and solve for the fastest partition that fits.

    Args:
        module: What is to be wrapped.
        cells: How many it has.
        devices: As given to the pipe.
        sample: A mini-batch of inputs.
        chunks: Number of micro-batches.
        checkpoint: As given to the pipe, or ``"auto"``: keep as many micro-batches as fit.
        memory_limit: Bytes, or text such as ``"20GiB"``, of every device, or one per device.

    Raises:
        ValueError: The arguments do not fit together, or no partition fits the memory.
    """
    if cells == 0:
        raise ValueError("an empty module has nothing to balance: leave sample and memory_limit out")
    stages = stage_count(cells, devices)
    limits = memory_bytes(memory_limit, stages)
    micro_batches = max(1, min(chunks, row_count(sample)))
    keep = None
    if checkpoint != "auto":
        keep = kept_micro_batches(check_checkpoint(checkpoint, stages), stages, micro_batches)
    device = check_devices(devices, stages)[0]
    with _intra_op_threads(max(1, torch.get_num_threads() // stages)):
        costs = profile(module, sample, device=device, chunks=chunks, company=stages - 1)
    rows = row_count(sample)
    size = sum(t.nbytes for t in tree_leaves(sample) if isinstance(t, Tensor))
    partition = solve_with_queues(
        costs,
        stages,
        micro_batches=micro_batches,
        memory_limit=limits,
        keep=keep,
        input_bytes=-(-size * -(-rows // micro_batches) // rows),
    )
    return Plan(list(partition.balance), tuple(partition.keep) if checkpoint == "auto" else checkpoint, partition)


def memory_bytes(limit: MemoryLimit | None, stages: int) -> int | list[int] | None:
    """A memory limit in bytes, or one per stage.

    Raises:
        TypeError, ValueError: It is not a size, or there is not one per stage.
    """
    if limit is None or isinstance(limit, int | str):
        return None if limit is None else _one_size(limit)
    if not isinstance(limit, Sequence):
        raise TypeError(f"memory_limit must be bytes, text such as '20GiB' or one per device, got {limit!r}")
    if len(limit) != stages:
        raise ValueError(f"memory_limit gives {len(limit)} sizes for {stages} stages: give one per stage, or one")
    return [_one_size(size) for size in limit]


def _one_size(size: Any) -> int:
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B?)\s*", size)
        if found is None:
            raise ValueError(
                f"memory_limit must be a size, such as '20GiB', '500 MB' or a number of bytes, got {size!r}"
            )
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS.get(found[2], 0))
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"memory_limit must be bytes or text such as '20GiB', got {type(size).__name__} {size!r}")
    if size <= 0:
        raise ValueError(f"memory_limit must be more than nothing, got {size} bytes")
    return size


@contextmanager
def _intra_op_threads(count: int) -> Iterator[None]:
    """Measure with the threads a worker will have."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
