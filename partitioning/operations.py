"""Floating-point operations, counted by one rule whatever the version of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counting_operations() -> FlopCounterMode:
    """A mode whose ``get_total_flops()`` says how many operations ran inside, by a rule of our own.

    Products of matrices and convolutions count, a multiplication and an addition as two, and all else is free.
    Attention is the products it consists of, as if no mask left any out: scores and values forward; backward the
    scores again, and the gradients of the values, the weights, the queries and the keys. torch.utils.flop_counter knows
    the products and convolutions; which kernels of fused attention it knows differs from version to version, so the
    CPU's, which ``estimate`` runs into, is counted here.
    """
    return FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


Shape = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of queries (B, heads, T, D), keys (B, groups, S, D) and values (B, groups, S, E)."""
    *rows, length, width = query
    return 2 * math.prod(rows) * length * key[-2] * (width + value[-1])


def _attention_backward(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The same, after the gradient (B, heads, T, E) of the result."""
    *rows, length, width = query
    return 2 * math.prod(rows) * length * key[-2] * (3 * width + 2 * value[-1])
