"""The norm of gradients that no one place holds: of the norms of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm(gradient: Tensor, norm_type: float) -> Tensor:
    """The norm of one gradient, on the CPU."""
    found: Tensor = torch.linalg.vector_norm(gradient.detach(), norm_type)
    return found.cpu()


def total(norms: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """The norm of all gradients together.

    Args:
        norms: Of each, in the order of the parameters, which the last bit depends on.
        norm_type: Of all of them.
        error_if_nonfinite: Raise where it is no finite number.

    Raises:
        RuntimeError: It is not.
    """
    found = torch.linalg.vector_norm(torch.stack(list(norms)), norm_type) if norms else torch.tensor(0.0)
    if error_if_nonfinite and not found.isfinite():
        raise RuntimeError(
            f"the norm of all gradients is {found.item()}, so they cannot be clipped: look for values in data or loss "
            "that are not finite, or leave error_if_nonfinite out"
        )
    return found
