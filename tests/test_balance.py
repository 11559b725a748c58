"""balance_by_time, balance_by_flops and balance_by_size."""

import time

import pytest
import torch
from nets import Apply
from torch import nn

from gpipe.partitioning.balance import balance_by_flops, balance_by_size, balance_by_time


def test_by_time_slow_cells_are_parted():
    def slow(x):
        time.sleep(0.03)
        return x

    module = nn.Sequential(Apply(slow), Apply(slow), *(nn.Linear(4, 4) for _ in range(4)))
    assert balance_by_time(2, module, torch.randn(3, 4), timeout=0.0) == [1, 5]
    assert balance_by_time(2, module, torch.randn(3, 4), timeout=0.0, device="cpu") == [1, 5]


def test_by_flops_wide_layers_weigh_more():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 4000), nn.Linear(4000, 8))
    assert balance_by_flops(2, module, torch.empty(5, 8, device="meta")) == [7, 1]


def test_by_size_parameters_and_activations():
    heavy = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 500), nn.Linear(500, 4), nn.Linear(4, 4))
    assert balance_by_size(2, heavy, torch.randn(2, 4)) == [2, 2]
    wide = nn.Sequential(nn.Sigmoid(), nn.Linear(4, 400, bias=False), nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid())
    assert balance_by_size(2, wide, torch.randn(1000, 4), param_scale=0) == [3, 2]
    assert balance_by_size(2, wide, torch.randn(1000, 4), chunks=1000, param_scale=4.0) == [2, 3]


@pytest.mark.parametrize("balance", [balance_by_time, balance_by_flops, balance_by_size])
def test_what_cannot_be_balanced_is_refused_before_anything_is_measured(balance):
    def forbidden(x):
        raise AssertionError("measured")

    module = nn.Sequential(Apply(forbidden), Apply(forbidden))
    for partitions in (0, 3, True, 1.0):
        with pytest.raises(ValueError, match=r"partitions.*must be 1 to the number of cells, 2, got"):
            balance(partitions, module, torch.randn(2, 2))


def test_a_scale_that_is_none_is_refused():
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="param_scale"):
            balance_by_size(1, nn.Sequential(nn.Linear(2, 2)), torch.randn(2, 2), param_scale=scale)


def test_nothing_of_the_module_changes():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(6, 4)
    state = torch.get_rng_state()
    balance_by_time(2, module, x, timeout=0.0)
    balance_by_size(2, module, x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is None for p in module.parameters())
