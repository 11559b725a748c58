"""The norm of gradients that no one place holds: of the norms of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

Norm = tuple[float, torch.dtype]


def norms(gradients: Mapping[str, Tensor], norm_type: float) -> dict[str, Norm]:
    """The norm of each gradient and its type; the host waits once for every device and type.

    Args:
        gradients: By name.
        norm_type: p of the p-norm.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, gradient in gradients.items():
        kinds.setdefault((gradient.device, gradient.dtype), []).append(name)
    found: dict[str, Norm] = {}
    for names in kinds.values():
        each = torch._foreach_norm([gradients[name].detach() for name in names], norm_type)
        values = torch.stack(each)
        found.update(zip(names, [(value, values.dtype) for value in values.tolist()], strict=True))
    return found


def total(norms: Sequence[Norm], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """The norm of all gradients together.

    Args:
        norms: Of each, in the order of the parameters, which the last bit depends on.
        norm_type: Of all of them.
        error_if_nonfinite: Raise where it is no finite number.

    Raises:
        RuntimeError: It is not.
    """
    dtype = reduce(torch.promote_types, [dtype for _, dtype in norms], norms[0][1] if norms else torch.float32)
    values = torch.tensor([value for value, _ in norms], dtype=dtype)
    found = torch.linalg.vector_norm(values, norm_type) if norms else torch.tensor(0.0)
    if error_if_nonfinite and not found.isfinite():
        raise RuntimeError(
            f"the norm of all gradients is {found.item()}, so they cannot be clipped: look for values in data or loss "
            "that are not finite, or leave error_if_nonfinite out"
        )
    return found
