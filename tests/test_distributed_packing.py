"""Messages between ranks: what arrives is what was sent, down to strides, alignment and shared memory."""

import pytest
import torch
from torch import nn

from gpipe.boundary import Boundary
from gpipe.ranks.packing import Arrival, pack

CPU = torch.device("cpu")


def passed(message):
    """The message as it arrives, and the bytes of tensors on the way."""
    header, buffers = pack(message, CPU)
    arrival = Arrival(header, CPU)
    assert [b.numel() for b in arrival.buffers] == [b.numel() for b in buffers]
    for there, here in zip(arrival.buffers, buffers, strict=True):
        assert here.dtype == there.dtype == torch.uint8
        there.copy_(here)
    arrival.move()
    return arrival.message(), sum(b.numel() for b in buffers)


TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.half,
    torch.bool,
    torch.uint8,
    torch.int64,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", [*TYPES, torch.float8_e4m3fn])
def test_every_type(dtype):
    x = torch.arange(12).reshape(3, 4).to(dtype)
    (found,), size = passed([x])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), x.view(torch.uint8))
    assert size == x.nbytes


BASE = torch.arange(96.0).reshape(4, 6, 4)


@pytest.mark.parametrize(
    "x",
    [
        BASE,
        BASE.transpose(0, 2),
        BASE[:, 0],
        BASE[1:, 2:4, ::2],
        BASE[..., :1].expand(4, 6, 4),
        BASE.to(memory_format=torch.preserve_format).unsqueeze(0).contiguous(memory_format=torch.channels_last),
        BASE.view(-1)[3:7],
        BASE.sum(),
        BASE[:0],
        BASE[:, :, :0].transpose(0, 1),
        torch.empty(0),
    ],
)
def test_every_layout(x):
    (found,), size = passed([x])
    assert torch.equal(found, x)
    assert found.stride() == x.stride()
    assert found.dtype == x.dtype
    assert size <= x.nbytes  # of a slice of a larger tensor, the slice alone
    if x.numel():
        assert found.data_ptr() % 64 == x.data_ptr() % 64


def test_tensors_that_share_memory_still_do():
    q, k, v = BASE.chunk(3, dim=1)
    (a, b, c, again), size = passed([q, k, v, q])
    assert size == BASE.nbytes
    for found, x in ((a, q), (b, k), (c, v), (again, q)):
        assert torch.equal(found, x)
        assert found.stride() == x.stride()
    a.zero_()
    assert torch.equal(again, a)
    assert torch.equal(b, k)
    few, size = passed([BASE[:, 0], BASE[:, 1], BASE[:, 0].detach()])
    assert size == 2 * BASE[:, 0].nbytes
    few[0].zero_()
    assert torch.equal(few[2], few[0])
    assert torch.equal(few[1], BASE[:, 1])


def test_gradients_that_are_none_and_values():
    found, size = passed([None, torch.ones(2), None, 3, "word", (1, None)])
    assert found[:1] + found[2:] == [None, None, 3, "word", (1, None)]
    assert size == 8


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # by torch's own pickling
def test_tensors_that_are_no_plain_memory():
    sparse = torch.eye(3).to_sparse()
    conjugate = torch.complex(torch.ones(2), torch.ones(2)).conj()
    found, _ = passed([sparse, conjugate, nn.Parameter(torch.ones(2)).detach()])
    assert torch.equal(found[0].to_dense(), torch.eye(3))
    assert torch.equal(found[1], conjugate)


def test_a_boundary():
    x = torch.ones(2, 3, requires_grad=True)
    tree = {"x": x * 2, "pair": (x > 0, None), "name": "n"}
    boundary = Boundary.of(tree)
    found, _ = passed(boundary)
    assert (found.needs_grad, found.places, found.spec) == (boundary.needs_grad, boundary.places, boundary.spec)
    assert torch.equal(found.tree()["x"], tree["x"])


def test_a_header_repeats_itself():
    first, second = (pack(Boundary.of({"x": torch.randn(2, 3), "k": 1}), CPU)[0] for _ in range(2))
    assert first == second


def test_what_cannot_be_pickled_is_refused():
    with pytest.raises(TypeError, match="tensors and values that can be pickled, got function whose pickling failed"):
        pack([lambda: 3], CPU)
