import copy

import pytest
import torch
from torch import nn

from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile

SPEED = Speed(flops=1e12, bytes=1e11)


def transformer(layers=3):
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True) for _ in range(layers)),
        nn.Linear(32, 5),
    )


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 2),
    )


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)

    def forward(self, inputs):
        x, tokens = inputs
        return x * 2, self.embed(tokens), tokens


class Join(nn.Module):
    def forward(self, inputs):
        x, embedded, _ = inputs
        return x + embedded.sum(1)


def saved_bytes(module, x):
    """Bytes of all storages autograd keeps of a forward of the whole; parameters, buffers and input left out."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers(), x)}
    saved = {}

    def pack(tensor):
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in own)


@pytest.mark.parametrize(
    ("net", "rows"), [(transformer, (8, 7, 32)), (convolutions, (8, 3, 8, 8))], ids=["transformer", "convolutions"]
)
def test_activation_bytes_add_up_to_what_autograd_keeps_of_the_whole(net, rows):
    module, x = net(), torch.randn(rows)
    costs = profile(module, x, chunks=4, repeats=1)
    assert sum(c.activation_bytes for c in costs) == saved_bytes(copy.deepcopy(module), x[:2])
    assert [c.boundary_bytes for c in costs][-1] == module(x[:2]).nbytes
    assert sum(c.parameter_bytes for c in costs) == sum(p.nbytes for p in module.parameters())
    assert all(c.forward_seconds > 0 for c in costs)


@pytest.mark.parametrize(
    ("net", "rows"), [(transformer, (8, 7, 32)), (convolutions, (8, 3, 8, 8))], ids=["transformer", "convolutions"]
)
def test_estimate_finds_the_bytes_that_profile_measures(net, rows):
    module, x = net(), torch.randn(rows)
    measured, estimated = profile(module, x, chunks=3, repeats=1), estimate(module, x, speed=SPEED, chunks=3)
    for a, b in zip(measured, estimated, strict=True):
        assert (a.name, a.activation_bytes, a.boundary_bytes) == (b.name, b.activation_bytes, b.boundary_bytes)
        assert a.parameter_bytes == b.parameter_bytes


def test_estimate_counts_operations():
    (cost,) = estimate(nn.Sequential(nn.Linear(1000, 2000, bias=False)), torch.randn(50, 1000), speed=Speed(1e9, 1e15))
    flops = 2 * 50 * 1000 * 2000
    assert cost.forward_seconds == pytest.approx(flops / 1e9)
    assert cost.backward_seconds == pytest.approx(flops / 1e9)  # the first cell needs no gradient of its input
    two = estimate(nn.Sequential(nn.Linear(9, 1000), nn.Linear(1000, 2000)), torch.randn(50, 9), speed=Speed(1e9, 1e15))
    assert two[1].backward_seconds == pytest.approx(2 * flops / 1e9)


def test_estimate_allocates_nothing_for_a_model_that_fits_nowhere():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(200_000, 200_000) for _ in range(50)))
    costs = estimate(module, torch.empty(4, 200_000, device="meta"), speed=SPEED)
    assert sum(c.parameter_bytes for c in costs) == 50 * 4 * (200_000**2 + 200_000)


def test_estimate_tells_cells_apart_that_differ_in_a_setting_only():
    class Repeated(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.layer, self.times = nn.Linear(64, 64), times

        def forward(self, x):
            for _ in range(self.times):
                x = self.layer(x)
            return x

    module = nn.Sequential(nn.Linear(64, 64), Repeated(1), Repeated(3))
    costs = estimate(module, torch.randn(256, 64), speed=Speed(1e6, 1e15))
    assert costs[2].forward_seconds == pytest.approx(3 * costs[1].forward_seconds)


@pytest.mark.parametrize("measure", [lambda m, x: profile(m, x, repeats=1), lambda m, x: estimate(m, x, speed=SPEED)])
def test_trees_frozen_cells_and_values_that_pass_through(measure):
    module = nn.Sequential(Pair(), Join(), nn.Linear(6, 2))
    module[2].requires_grad_(False)
    costs = measure(module, (torch.randn(4, 6), torch.randint(0, 11, (4, 3))))
    assert costs[0].boundary_bytes == 4 * 6 * 4 + 4 * 3 * 6 * 4 + 4 * 3 * 8
    assert costs[1].activation_bytes == 0  # a sum keeps nothing


def test_profile_leaves_everything_as_it_was():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
    module(torch.randn(5, 6)).sum().backward()
    x, values = torch.randn(8, 6), copy.deepcopy(module.state_dict())
    gradients, state = [p.grad.clone() for p in module.parameters()], torch.get_rng_state()
    profile(module, x, chunks=2, repeats=1)
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in values.items())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, module.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("measure", [lambda m, x: profile(m, x, repeats=1), lambda m, x: estimate(m, x, speed=SPEED)])
def test_what_cannot_be_measured_is_refused(measure):
    with pytest.raises(ValueError, match="no cells"):
        measure(nn.Sequential(), torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"same number of rows.*tensors of \[2, 3\] rows"):
        measure(nn.Sequential(Pair()), (torch.randn(2, 6), torch.zeros(3, 3, dtype=torch.long)))
    with pytest.raises(RuntimeError) as caught:
        measure(nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 2)), torch.randn(2, 3))
    assert any("cell 1 ('1', Linear)" in note for note in caught.value.__notes__)


def test_profile_wants_one_device():
    with pytest.raises(ValueError, match="on one device, found cpu, meta"):
        profile(nn.Sequential(Pair()), (torch.randn(2, 6), torch.zeros(2, 3, dtype=torch.long, device="meta")))
