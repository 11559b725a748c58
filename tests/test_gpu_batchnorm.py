"""Batch norm on accelerators: the statistics come from forward's own kernels, and the layers are updated together."""

from collections import Counter

import pytest
import torch
from nets import PlainLoop, accelerator, assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]

KIND = getattr(torch.accelerator.current_accelerator(), "type", "cpu")
FREE = (
    "promote_types",
    "detach",
    "unbind",
    "view",
    "empty",
    "alias",
    "select",
    "split",
    "slice",
    "t.",
    "expand",
)  # no kernel


def placements():
    count = torch.accelerator.device_count()
    return [[accelerator()], [accelerator()] * 2] + [[accelerator(0), accelerator(1)]] * (count > 1)


def net(layers=2, momentum=0.1):
    torch.manual_seed(1)
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=momentum)) for _ in range(layers)]
    return nn.Sequential(*blocks)


def make_pipe(module, devices, checkpoint="never", chunks=4, deferred=True):
    balance = [len(module)] if len(devices) == 1 else [1, len(module) - 1]
    return gpipe.GPipe(
        module, balance, devices=devices, chunks=chunks, checkpoint=checkpoint, seed=7, deferred_batch_norm=deferred
    )


def buffers(module):
    return {name: b.cpu() for name, b in module.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("rows", [12, 11])
def test_deferred_statistics_are_those_of_the_whole_batch(momentum, rows):
    module, plain = (
        nn.Sequential(nn.BatchNorm2d(5, momentum=momentum)),
        nn.Sequential(nn.BatchNorm2d(5, momentum=momentum)),
    )
    plain.to(accelerator()).double()
    pipe = make_pipe(module.double(), [accelerator()], "always", chunks=5)
    for step in range(3):
        x = torch.randn(rows, 5, 3, 2, dtype=torch.float64) * (step + 3) + 1
        pipe(x).square().mean().backward()
        plain(x.to(accelerator()))
    torch.testing.assert_close(buffers(module), buffers(plain), rtol=1e-12, atol=1e-12)
    assert module[0].momentum == momentum


def test_the_bits_do_not_depend_on_placement_or_checkpoint():
    x = torch.randn(11, 4, 6, 5)
    found = {}
    for devices in placements():
        for checkpoint in ("always", "except_last", "never"):
            module = net()
            pipe = make_pipe(module, devices, checkpoint)
            for _ in range(3):
                pipe(x).square().mean().backward()
            found[str(devices), checkpoint] = buffers(module) | {k: p.grad.cpu() for k, p in module.named_parameters()}
    first = next(iter(found.values()))
    assert first["1.1.num_batches_tracked"] == 3
    for where, values in found.items():
        assert_same(values, first, where)


@pytest.mark.parametrize("checkpoint", ["always", "never"])
def test_outputs_are_the_plain_loops(checkpoint):
    x = torch.randn(11, 4, 6, 5)
    module = net()
    found = make_pipe(module, [accelerator()], checkpoint)(x).detach()
    assert torch.equal(found, PlainLoop(module, 4)(x.to(accelerator())))


def test_low_precision_is_summed_in_float32():
    x = (torch.randn(4096, 2) + 100).bfloat16()
    for module, dtype in ((nn.Sequential(nn.BatchNorm1d(2)), torch.float32), (nn.Sequential(nn.BatchNorm1d(2)), None)):
        plain = nn.BatchNorm1d(2)
        plain(x.float())
        make_pipe(module if dtype else module.bfloat16(), [accelerator()], chunks=7)(x)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype else {"rtol": 1e-2, "atol": 1e-2}
        for name in ("running_mean", "running_var"):
            found = getattr(module[0], name).float().cpu()
            torch.testing.assert_close(found, getattr(plain, name), **tolerance)


def test_a_layer_with_a_forward_of_its_own_is_measured():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x)

    found = []
    for layer in (Own(4), nn.BatchNorm2d(4)):
        pipe = make_pipe(nn.Sequential(layer), [accelerator()])
        pipe(torch.arange(4.0 * 4 * 9).reshape(4, 4, 3, 3).sqrt())
        found.append(buffers(layer))
    torch.testing.assert_close(*found)


class Operators(TorchDispatchMode):
    """Counts those that start kernels."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            self.counts[name.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def operators(step):
    step()  # which buffers change is learned first
    with Operators() as seen:
        step()
    return seen.counts


# A kernel for every micro-batch and layer, and fifty for every layer at the end.
def test_deferring_takes_few_operators_a_layer():
    layers, micro_batches = 6, 8
    x = torch.randn(16, 4, 4, 4, device=accelerator())

    def counted(deferred):
        pipe = make_pipe(net(layers), [accelerator()], chunks=micro_batches, deferred=deferred)
        return operators(lambda: pipe(x))

    more = counted(True).total() - counted(False).total()
    assert more <= 0


# Three copies for every layer and micro-batch before forward, and again before its recompute.
def test_buffers_are_copied_together():
    layers, micro_batches = 6, 8
    x = torch.randn(16, 4, 4, 4, device=accelerator())
    pipe = make_pipe(net(layers), [accelerator()], "always", micro_batches, deferred=False)
    found = operators(lambda: pipe(x).sum().backward())
    clones, together = found["clone"], found["_foreach_copy_"]
    assert 0 < together <= 2 * 2 * micro_batches
    assert clones <= 3 * micro_batches
