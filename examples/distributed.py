"""A pipeline over processes, saved as it goes: torchrun --nproc-per-node 2 examples/distributed.py [FOLDER].

Run again with the same folder and any number of processes, it goes on from the newest save. With plain python it is one
process.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import gpipe

STEPS, EVERY = 60, 20


def model():
    """Every rank calls this without allocating anything, then makes its own cells alone."""
    return nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


folder = sys.argv[1] if len(sys.argv) > 1 else "runs/distributed"
if "RANK" in os.environ:
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)

torch.set_num_threads(1)
inputs = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))
targets = inputs[:, :4].argmax(1)

pipe = gpipe.DistributedGPipe(model, chunks=8, loss_fn=nn.functional.cross_entropy, seed=0)
optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
saves = gpipe.Saves(folder)
restored = saves.read(pipe, optimizer)
if restored is not None:
    pipe.step = restored.step  # random draws go on from there
for step in range(pipe.step, STEPS):
    optimizer.zero_grad()
    loss = pipe.train_step(inputs, targets)  # inputs count on the first stage's rank, targets on the last's
    pipe.clip_grad_norm_(1.0)  # over the parameters of all ranks
    optimizer.step()
    if (step + 1) % EVERY == 0:
        saves.write(step + 1, pipe, optimizer, wait=False)
        if dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.6f}")

saves.wait()
dist.destroy_process_group()
