"""The arguments of GPipe, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

Checkpoint = Literal["always", "except_last", "never"] | int | Sequence[int]

_KEEP = {"always": 0, "except_last": 1}


def check_chunks(chunks: Any) -> int:
    """``chunks`` as a positive int."""
    if isinstance(chunks, bool) or not isinstance(chunks, int):
        raise TypeError(f"chunks must be an int, the number of micro-batches, got {type(chunks).__name__} {chunks!r}")
    if chunks < 1:
        raise ValueError(f"chunks, the number of micro-batches, must be at least 1, got {chunks}")
    return chunks


def check_balance(balance: Iterable[Any], cells: int) -> list[int]:
    """``balance`` as a list of positive ints that sum to ``cells``."""
    if not isinstance(balance, Iterable):
        raise TypeError(f"balance must be a list of ints, the number of cells of every stage, got {balance!r}")
    given = list(balance)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in given):
        raise TypeError(f"balance must be ints, the number of cells of every stage, got {given!r}")
    if any(n < 1 for n in given):
        raise ValueError(f"every stage needs at least one cell, got balance {given}: leave the empty stage out")
    if sum(given) != cells:
        raise ValueError(
            f"balance must sum to the number of cells: the module has {cells}, balance {given} sums to {sum(given)}. "
            f"Leave balance out, or try balance={_suggest(cells, len(given))}"
        )
    return given


def _suggest(cells: int, stages: int) -> list[int]:
    stages = max(1, min(stages, cells))
    return [cells // stages + (k < cells % stages) for k in range(stages)] if cells else []


def check_devices(devices: Iterable[Any] | None, stages: int | None) -> list[torch.device]:
    """One device for every stage.

    Args:
        devices: Given by the user; None for every accelerator, or the CPU once per stage where there is none.
        stages: Number of stages if known; otherwise it is the number of devices.

    Raises:
        IndexError: Fewer devices than stages.
    """
    if devices is None:
        if not torch.accelerator.is_available():
            return [torch.device("cpu")] * (torch.get_num_threads() if stages is None else stages)
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        devices = [torch.device(kind.type, i) for i in range(torch.accelerator.device_count())]
    if isinstance(devices, str) or not isinstance(devices, Iterable):
        raise TypeError(f"devices must be a list, one device for every stage, got {devices!r}: [{str(devices)!r}]?")
    found = [_there(torch.device(d)) for d in devices]
    if stages is not None and len(found) < stages:
        raise IndexError(
            f"too few devices to hold the stages: {stages} stages, {len(found)} devices "
            f"({', '.join(map(str, found))}). Give a shorter balance, or name a device more than once to put several "
            "stages on it"
        )
    if not found:
        raise IndexError("devices is empty: name one device per stage, or leave devices out")
    return found[:stages]


def _there(device: torch.device) -> torch.device:
    """The device with its number, so that equal devices compare equal.

    Raises:
        IndexError: This process has none such.
    """
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "meta":
        return device
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    if kind is None or count == 0:
        raise IndexError(f"devices names {device}, and there is no accelerator: name cpu, once for every stage")
    last = torch.device(kind.type, count - 1)
    if device.type != kind.type or (device.index or 0) >= count:
        known = str(last) if count == 1 else f"{kind.type}:0 to {last}"
        raise IndexError(f"devices names {device}, and there is {known}: name these, or cpu, one for every stage")
    return device if device.index is not None else torch.device(kind.type, torch.accelerator.current_device_index())


def check_passes(two_pass: Any, loss_over: str) -> None:
    """Refuse a ``two_pass`` that is no bool, or is asked for where there is no loss over the mini-batch."""
    if not isinstance(two_pass, bool):
        raise TypeError(f"two_pass must be True or False, got {two_pass!r}")
    if two_pass and loss_over == "micro_batch":
        raise ValueError(
            "two_pass=True is for a loss over the whole mini-batch; with loss_over='micro_batch' forward, loss and "
            "backward of a micro-batch follow each other anyway: leave two_pass out, or give loss_over='mini_batch'"
        )


def check_seed(seed: Any) -> int:
    """``seed`` as an int; None draws it from torch's default generator."""
    if seed is None:
        return int(torch.randint(0, 2**63 - 1, (), device="cpu"))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, the base seed of random draws in the cells, or None, got {seed!r}")
    return seed


def check_checkpoint(checkpoint: Any, stages: int) -> Checkpoint:
    """``checkpoint`` if it is one of the three words, an int, or one int per stage."""
    if isinstance(checkpoint, str):
        if checkpoint not in ("always", "except_last", "never"):
            raise ValueError(
                f"checkpoint must be 'always', 'except_last', 'never', an int or one int per stage, got {checkpoint!r}"
            )
        return checkpoint  # type: ignore[return-value]
    numbers = [checkpoint] if isinstance(checkpoint, int) else checkpoint
    if not isinstance(numbers, Sequence) or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(
            "checkpoint must be 'always', 'except_last', 'never', an int (the number of micro-batches that keep their "
            f"activations) or one int per stage, got {checkpoint!r}"
        )
    if any(n < 0 for n in numbers):
        raise ValueError(f"checkpoint counts the micro-batches that keep their activations, got {checkpoint!r}")
    if not isinstance(checkpoint, int) and len(numbers) != stages:
        raise ValueError(f"checkpoint gives {len(numbers)} numbers for {stages} stages: give one per stage, or one int")
    return checkpoint if isinstance(checkpoint, int) else tuple(numbers)


def kept_micro_batches(checkpoint: Checkpoint, stages: int, micro_batches: int) -> tuple[int, ...]:
    """Per stage the number of micro-batches that keep their activations."""
    if isinstance(checkpoint, str):
        keep: Sequence[int] = [_KEEP.get(checkpoint, micro_batches)] * stages
    else:
        keep = [checkpoint] * stages if isinstance(checkpoint, int) else checkpoint
    return tuple(min(q, micro_batches) for q in keep)
