"""What a pipe takes over from the module it wraps."""

from __future__ import annotations

from typing import Any

from torch import nn


def registries(module: nn.Module) -> dict[str, Any]:
    """What makes ``module`` an ``nn.Module`` - parameters, buffers, children, hooks - as the very same objects."""
    return {key: vars(module)[key] for key in vars(nn.Module())}
