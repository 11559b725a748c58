"""Costs measured on simulated accelerators, which are known to take so long, and to hold so much."""

import threading
import time

import pytest
import torch
from torch import nn

from gpipe.models.unet import unet
from gpipe.partitioning import live
from gpipe.partitioning.profile import owned, profile
from gpipe.testing import accelerators
from gpipe.training.vitals import peak_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators: --accelerators"),
]

FORWARD, BACKWARD, LAUNCHING = 0.04, 0.06, 0.01  # seconds


class Taking(torch.autograd.Function):
    """Nothing, which takes the host a while to launch and the device longer to do."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(LAUNCHING)
        return accelerators.spend(x, FORWARD)

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(LAUNCHING)
        return accelerators.spend(gradient, BACKWARD)


class Slow(nn.Linear):
    """A cell whose device is busy for a while."""

    def forward(self, x):
        return Taking.apply(super().forward(x))


# The host waited for the device before and after every cell, and so launching counted in full.
def test_seconds_are_the_devices_where_it_takes_longer_than_launching():
    for cost in profile(nn.Sequential(Slow(4, 4), Slow(4, 4)), torch.ones(8, 4, device="sim:0"), repeats=3):
        assert cost.forward_seconds == pytest.approx(FORWARD, abs=0.005)
        assert cost.backward_seconds == pytest.approx(BACKWARD, abs=0.005)


# Every round copied every cell to the device.
def test_cells_are_copied_to_the_device_once_for_all_rounds():
    moves = []

    class Moved(nn.Linear):
        def _apply(self, *args, **kwargs):
            moves.append(self)
            return super()._apply(*args, **kwargs)

    profile(nn.Sequential(Moved(4, 4), Moved(4, 4)), torch.ones(8, 4, device="sim:0"), repeats=4)
    assert len(moves) == 2 * 2  # for its bytes, and for its seconds


def test_cells_that_skip_are_measured_one_at_a_time():
    module, x = unet(depth=1, num_convs=1, base_channels=4), torch.randn(2, 3, 8, 8)
    here = profile(module, x, repeats=2)
    there = profile(module, x, device="sim:1", repeats=2)
    assert [cost.skips for cost in there] == [cost.skips for cost in here]
    assert [cost.activation_bytes for cost in there] == [cost.activation_bytes for cost in here]
    assert all(cost.forward_seconds > 0 for cost in there)


@pytest.fixture
def workspaces(monkeypatch):
    """Products that take a workspace each thread keeps, as cuBLAS's do; the threads that have one."""
    held = {}

    def take(device):
        if threading.get_ident() not in held:
            held[threading.get_ident()] = torch.empty(2**20, dtype=torch.uint8, device=device)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            take(x.device)
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, gradient):
            take(gradient.device)
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.t() @ x

    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: Product.apply(x, weight) + bias)
    return held


# The first product of a thread takes a workspace that the library keeps, and the first cell was charged with it.
def test_the_first_cell_is_not_charged_with_workspaces_of_libraries(workspaces):
    module, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(8, 16, device="sim:0")
    found = [one.workspace_bytes for one in owned(module, x)]
    assert len(workspaces) == 2
    assert max(found) < 2**20


# Some kinds of accelerators have no allocator that tells; a run's log then leaves their bytes out.
def test_accelerators_whose_allocator_does_not_tell(monkeypatch):
    def refuse(*args):
        raise RuntimeError("Allocator for sim is not a DeviceAllocator.")

    module, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(8, 16, device="sim:0")
    expected = owned(module, x)
    assert set(peak_memory([x.device])) == {"process", "sim_0"}
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.accelerator, name, refuse)
    assert set(peak_memory([x.device])) == {"process"}
    assert isinstance(live.meter(x.device), live.LiveBytes)
    assert [one.boundary_bytes for one in owned(module, x)] == [one.boundary_bytes for one in expected]
