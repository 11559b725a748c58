"""How operations are counted: by the same rule with every version of torch."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gpipe.partitioning.operations import counting_operations

B, H, T, S, D = 2, 4, 16, 24, 8
QUERY, KEYS = (B, H, T, D), (B, H, S, D)
ATTENTION = 2 * B * H * T * S * 2 * D  # scores and values
AGAIN = 2 * B * H * T * S * D  # the scores, which fused attention computes again in its backward


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(T, S))


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    ("compute", "shapes", "forward", "backward"),
    [
        (lambda x: x.tanh() * 2, [(T, D)], 0, 0),
        (torch.matmul, [(T, D), (D, S)], 2 * T * D * S, 4 * T * D * S),
        (torch.bmm, [(B, T, D), (B, D, S)], 2 * B * T * D * S, 4 * B * T * D * S),
        (F.linear, [(B, T, D), (S, D), (S,)], 2 * B * T * D * S, 4 * B * T * D * S),
        (F.conv2d, [(B, 3, 8, 8), (5, 3, 3, 3)], 2 * B * 36 * 5 * 27, 4 * B * 36 * 5 * 27),
        (attention, [QUERY, KEYS, KEYS], ATTENTION, 2 * ATTENTION + AGAIN),
        (causal, [QUERY, KEYS, KEYS], ATTENTION, 2 * ATTENTION + AGAIN),
        (masked, [QUERY, KEYS, KEYS], ATTENTION, 2 * ATTENTION + AGAIN),
        (grouped, [QUERY, (B, 2, S, D), (B, 2, S, D)], ATTENTION, 2 * ATTENTION + AGAIN),
    ],
)
def test_operations_forward_and_backward(compute, shapes, forward, backward):
    with FakeTensorMode():
        inputs = [torch.empty(shape, requires_grad=True) for shape in shapes]
        with counting_operations() as found:
            output = compute(*inputs)
        assert found.get_total_flops() == forward
        with counting_operations() as found:
            output.sum().backward()
        assert found.get_total_flops() == backward
