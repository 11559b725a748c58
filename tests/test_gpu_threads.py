"""Threads of the user that share accelerators: each keeps its streams, its device and its draws."""

import sys
import threading

import pytest
import torch
from nets import accelerator
from torch import nn

import gpipe
from gpipe import lanes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator, and this machine has none"),
]


@pytest.fixture
def often():
    """Threads take turns after a few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_copy_keep_their_streams_and_devices(often):
    """A stream entered as a context manager keeps what was current on itself, for whichever thread leaves it first."""
    count = torch.accelerator.device_count()
    changed = []

    def copies(own):
        stream = torch.Stream(accelerator())
        torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(own)
        for _ in range(1000):
            found = lanes.entered(torch.ones(4), accelerator())
            if count > 1:
                lanes.cross([found], accelerator(0), accelerator(1))
            now = torch.accelerator.current_stream(accelerator()), torch.accelerator.current_device_index()
            if now != (stream, own):
                changed.append(own)
                break

    at_once(*(lambda own=own: copies(own) for own in (0, count - 1, 0)))
    assert not changed


def gradients(pipe):
    for step in range(20):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        pipe.train_step(x, x, nn.functional.mse_loss, "micro_batch", schedule="one_f_one_b")
    return [p.grad.cpu() for p in pipe.parameters()]


def test_pipes_that_train_at_once_on_the_same_devices_draw_as_each_alone(often):
    """A device's default generator serves one pipe at a time."""
    devices = [accelerator(0), accelerator(torch.accelerator.device_count() - 1)]

    def pipe(seed):
        torch.manual_seed(seed)
        cells = (nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3)) for _ in range(4))
        return gpipe.GPipe(nn.Sequential(*cells), [2, 2], devices=devices, chunks=4, seed=1)

    alone = [gradients(pipe(seed)) for seed in range(2)]
    pipes = [pipe(seed) for seed in range(2)]
    found = {}
    at_once(*(lambda i=i: found.update({i: gradients(pipes[i])}) for i in range(2)))
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(alone[i], found[i], strict=True))
