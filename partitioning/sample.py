"""The micro-batch that cells are measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only


def first_micro_batch(sample: Any, chunks: int) -> Any:
    """The first, largest of ``chunks`` micro-batches of ``sample``.

    Raises:
        ValueError: ``sample`` has no tensor, or its tensors disagree in their rows.
    """
    rows = {t.shape[0] for t in tree_leaves(sample) if isinstance(t, Tensor) and t.dim() > 0}
    if len(rows) != 1:
        found = f"tensors of {sorted(rows)} rows" if rows else "no tensor"
        raise ValueError(
            f"sample must hold tensors that all have the same number of rows (dimension 0), found {found}: give one "
            "mini-batch of what the first cell takes"
        )
    (n,) = rows
    size = -(-n // max(1, min(chunks, n)))
    return tree_map_only(Tensor, lambda t: t[:size] if t.dim() > 0 else t, sample)


def sample_device(sample: Any) -> torch.device:
    """The one device all tensors of ``sample`` are on.

    Raises:
        ValueError: They are on several, or there is no tensor.
    """
    devices = {t.device for t in tree_leaves(sample) if isinstance(t, Tensor)}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no tensor"
        raise ValueError(f"the tensors of sample must be on one device, found {found}: move them to the first stage's")
    return devices.pop()
