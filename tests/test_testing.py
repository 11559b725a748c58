import pytest
import torch
from torch import nn

from gpipe.testing import assert_exact


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return {"left": self.left(x), "right": self.right(x).tanh()}


def mixed_net():
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.BatchNorm1d(16),
        nn.Dropout(0.3),
        nn.ReLU(inplace=True),
        nn.utils.parametrizations.spectral_norm(nn.Linear(16, 6)),
        Both(),
    )


def test_accepts_a_module_with_dropout_buffers_and_several_outputs():
    assert_exact(mixed_net(), torch.randn(11, 8))


def test_leaves_the_module_and_the_global_state_alone():
    net = mixed_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert_exact(net, torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), stages=(2,), steps=1)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert torch.get_num_threads() == threads
    assert torch.equal(state, torch.get_rng_state())


class Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def test_names_what_differs_when_a_cell_keeps_state_elsewhere():
    with pytest.raises(AssertionError, match=r"\[2\], checkpoint 'always': step 0: gradient of 0.weight differs"):
        assert_exact(nn.Sequential(nn.Linear(4, 4), Counts()), torch.randn(8, 4))


def test_refuses_a_module_without_anything_to_train():
    with pytest.raises(ValueError, match="no output requires a gradient"):
        assert_exact(nn.Sequential(nn.ReLU()), torch.randn(4, 2))
