"""float16 on accelerators: a ``GradScaler`` with ``train_step``."""

import pytest
import torch
import torch.nn.functional as F
from nets import assert_same, linears
from torch import nn

import gpipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]

WAYS = [
    {"loss_over": "mini_batch"},
    {"loss_over": "mini_batch", "two_pass": True},
    {"loss_over": "micro_batch"},
    {"loss_over": "micro_batch", "schedule": "one_f_one_b"},
    {"loss_over": "micro_batch", "schedule": "zero_bubble_h1"},
]
NAMES = ["mini_batch", "two_pass", "micro_batch", "one_f_one_b", "zero_bubble_h1"]


def kind():
    return torch.accelerator.current_accelerator().type


def placements():
    count = torch.accelerator.device_count()
    return [[torch.device(kind(), k % count) for k in range(stages)] for stages in (1, 2, 3)]


def trained(devices, way, scale):
    """Three steps, the second of which has no finite gradients; parameters, losses and scale afterwards."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    pipe = gpipe.GPipe(
        module, [[3], [1, 2], [1, 1, 1]][len(devices) - 1], devices=devices, chunks=3, checkpoint="never"
    )
    optimizer = torch.optim.SGD(pipe.parameters(), 0.1)
    scaler = torch.amp.GradScaler(kind(), init_scale=scale)
    x, y = torch.randn(2, 11, 16, generator=torch.Generator().manual_seed(1))
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        target = y * float("inf") if step == 1 else y
        with torch.autocast(kind(), torch.float16):
            losses.append(pipe.train_step(x, target, F.mse_loss, **way, scaler=scaler))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return {"loss": torch.stack(losses).cpu()} | {
        k: v.cpu() for k, v in module.state_dict().items()
    }, scaler.get_scale()


@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_float16_has_the_same_bits_for_every_placement(way):
    expected, scale = trained(placements()[0], way, 256.0)
    assert scale == 128
    for devices in placements()[1:]:
        found, scale = trained(devices, way, 256.0)
        assert scale == 128
        assert_same(found, expected, str(devices))


# Without a scale, gradients below 6e-8 are zeros in float16.
@pytest.mark.parametrize("way", WAYS, ids=NAMES)
def test_small_gradients_are_there(way):
    def gradients(scaler):
        torch.manual_seed(0)
        module = linears(2, 8)
        pipe = gpipe.GPipe(module, [1, 1], devices=placements()[1], chunks=2, checkpoint="never")
        x, y = torch.randn(2, 8, 8)
        with torch.autocast(kind(), torch.float16):
            pipe.train_step(x, y, lambda output, target: F.mse_loss(output, target) * 1e-7, **way, scaler=scaler)
        return [p.grad.abs().max().item() for p in module.parameters()]

    assert 0.0 in gradients(None)
    assert min(gradients(torch.amp.GradScaler(kind(), init_scale=2.0**16))) > 0
