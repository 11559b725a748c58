"""A pipeline over processes: torchrun --nproc-per-node 2 examples/distributed.py; with python alone, one process."""

import os
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import gpipe


def model():
    """Every rank calls this without allocating anything, then makes its own cells alone."""
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


if "RANK" in os.environ:
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)

torch.set_num_threads(1)
inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
targets = inputs[:, :4].argmax(1)

pipe = gpipe.DistributedGPipe(model, chunks=8, loss_fn=nn.functional.cross_entropy, seed=0)
optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
for step in range(60):
    optimizer.zero_grad()
    loss = pipe.train_step(inputs, targets)  # inputs count on the first stage's rank, targets on the last's
    optimizer.step()
    if step % 20 == 19 and dist.get_rank() == 0:
        print(f"step {step + 1}: loss {loss.item():.6f}")

dist.destroy_process_group()
