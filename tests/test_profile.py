import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from gpipe.models.unet import unet
from gpipe.partitioning.alone import alone
from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.cost import SkipCost
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import owned, profile
from gpipe.partitioning.timing import one_by_one
from gpipe.skip import Namespace, pop, skippable, stash

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


# Fake tensors bring a device that is none, autograd began a thread for it, and no fork of the process went backward.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.skipif(torch.accelerator.is_available(), reason="autograd does not fork where there are accelerators")
def test_a_process_forks_as_before_after_an_estimate():
    program = """
import os, sys, torch
from torch import nn
from gpipe.partitioning.estimate import Speed, estimate
module, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(4, 2)
estimate(module, x, speed=Speed(1e9, 1e9))
module(x).sum().backward()
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
module(x).sum().backward()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


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


# --- values that skip cells -------------------------------------------------------------------------------------------


@skippable(stash=["value"])
class Stash(nn.Module):
    """Stashes what ``make`` makes of its input, which it hands on."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        yield stash("value", self.make(x))
        return x * 1


@skippable(pop=["value"])
class Pop(nn.Module):
    """Adds ``use`` of what was stashed to its input."""

    def __init__(self, use):
        super().__init__()
        self.use = use

    def forward(self, x):
        value = yield pop("value")
        return x if value is None else x + self.use(value)


def once(value):
    return value * 2


def squared(value):
    return value * value


def skips(module, x, measure):
    costs = profile(module, x, repeats=1) if measure == "profile" else estimate(module, x, speed=SPEED)
    return {cost.name: cost.skips for cost in costs}


BOTH = pytest.mark.parametrize("measure", ["profile", "estimate"])
SIZE = 5 * 6 * 4


@BOTH
@pytest.mark.parametrize(
    ("make", "use", "kept", "handed_on"),
    [(torch.sin, once, 0, 0), (torch.sin, squared, SIZE, SIZE), (torch.sigmoid, squared, SIZE, 0)],
    ids=["dropped", "kept where it is popped", "kept at both ends"],
)
def test_a_value_that_skips_cells_has_one_owner(measure, make, use, kept, handed_on):
    module = nn.Sequential(nn.Linear(6, 6), Stash(make), nn.Linear(6, 6), nn.Tanh(), Pop(use))
    found = skips(module, torch.randn(5, 6), measure)
    assert found == {"0": (), "1": (SkipCost(3, SIZE, kept, handed_on, SIZE, SIZE),), "2": (), "3": (), "4": ()}


@BOTH
def test_what_the_next_or_a_nearer_cell_keeps_is_not_counted_again(measure):
    @skippable(stash=["a", "b"])
    class Twice(nn.Module):
        def forward(self, x):
            y = x.sin()
            yield stash("a", y)
            yield stash("b", y)
            return x * 1 if self.training else y

    @skippable(pop=["a"])
    class PopA(nn.Module):
        def forward(self, x):
            return x + squared((yield pop("a")))

    @skippable(pop=["b"])
    class PopB(nn.Module):
        def forward(self, x):
            return x + squared((yield pop("b")))

    module = nn.Sequential(nn.Linear(6, 6), Twice(), nn.Linear(6, 6), PopB(), PopA())
    assert [(s.cells_on, s.handed_on_bytes) for s in skips(module, torch.randn(5, 6), measure)["1"]] == [
        (2, SIZE),
        (3, 0),
    ]
    assert [s.handed_on_bytes for s in skips(module.eval(), torch.randn(5, 6), measure)["1"]] == [0, 0]


def test_all_that_a_unet_keeps_is_counted_once():
    module, x = unet(depth=2, num_convs=2, base_channels=4, dropout=0.0), torch.randn(4, 3, 8, 8)
    costs = profile(module, x, chunks=2, repeats=1)
    handed_on = sum(skip.handed_on_bytes for cost in costs for skip in cost.skips)
    assert sum(c.activation_bytes for c in costs) + handed_on == saved_bytes(copy.deepcopy(module), x[:2])
    assert [c.skips for c in costs] == [c.skips for c in estimate(module, x, speed=SPEED, chunks=2)]
    # the gradient is a part of that of the concatenation, rows of which lie twice as far apart
    assert [s for c in costs for s in c.skips] == [
        SkipCost(9, 2048, 0, 0, gradient_bytes=3072, gradient_storage_bytes=4096),
        SkipCost(3, 1024, 0, 0, gradient_bytes=1536, gradient_storage_bytes=2048),
    ]


@BOTH
def test_what_is_stashed_gets_a_gradient(measure):
    gradients = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            gradients.append(gradient.shape)
            return gradient

    module = nn.Sequential(nn.Linear(6, 6), Stash(Marked.apply), Pop(once))
    skips(module, torch.randn(5, 6), measure)
    assert set(gradients) == {(5, 6)}


@BOTH
def test_none_costs_nothing_and_names_are_kept_apart(measure):
    def level(make, inner):
        namespace = Namespace()
        return Stash(make).isolate(namespace), *inner, Pop(once).isolate(namespace)

    module = nn.Sequential(nn.Linear(6, 6), *level(torch.sin, level(lambda x: None, [nn.ReLU()])))
    found = skips(module, torch.randn(5, 6), measure)
    assert [len(skip) for skip in found.values()] == [0, 1, 0, 0, 0, 0]
    assert found["1"][0].cells_on == 4
    module = nn.Sequential(nn.Linear(6, 6), *level(torch.sin, level(lambda x: x[:, :1].cos(), [nn.ReLU()])))
    assert [skip.value_bytes for cell in skips(module, torch.randn(5, 6), measure).values() for skip in cell] == [
        SIZE,
        SIZE // 6,
    ]


def test_skips_pass_one_by_one_and_in_company():
    module = unet(depth=1, num_convs=1, base_channels=4)
    x = torch.randn(2, 3, 8, 8)
    assert [b.skips for b in owned(module, x)] == [c.skips for c in profile(module, x, repeats=2, company=1)]
    seconds = one_by_one(alone(cells_of(module)), x, torch.device("cpu"), repeats=2)
    assert [len(rounds) for rounds in seconds] == [2] * len(module)


@BOTH
def test_skips_that_do_not_match_are_refused(measure):
    with pytest.raises(TypeError, match="'value' is popped by cell '1' and stashed by none"):
        skips(nn.Sequential(nn.Linear(6, 6), Pop(once)), torch.randn(5, 6), measure)


# The first backward after a forward gets its memory from the system, which is slow, and in a stage it is one of many.
def test_seconds_are_those_with_another_micro_batch_under_way():
    events = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            events.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            events.append("backward")
            return gradient

    class Cell(nn.Linear):
        def forward(self, x):
            return Seen.apply(super().forward(x))

    profile(nn.Sequential(Cell(2, 2)), torch.ones(4, 2), repeats=2)
    assert events[-8:] == ["forward", "forward", "backward", "backward"] * 2


def test_profile_wants_one_device():
    with pytest.raises(ValueError, match="on one device, found cpu, meta"):
        profile(nn.Sequential(Pair()), (torch.randn(2, 6), torch.zeros(2, 3, dtype=torch.long, device="meta")))
