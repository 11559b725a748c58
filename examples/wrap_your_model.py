"""Ten lines from an nn.Sequential to a pipelined training loop."""

import torch
from torch import nn

import gpipe

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
inputs = torch.randn(512, 32)
targets = inputs[:, :4].argmax(1)

pipe = gpipe.GPipe(
    model, balance=[2, 3], devices=["cpu", "cpu"], chunks=8
)  # the one line: two stages, eight micro-batches
optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
for step in range(60):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(pipe(inputs), targets)  # sees the whole mini-batch
    loss.backward()  # runs the backward pipeline
    optimizer.step()
    if step % 20 == 19:
        print(f"step {step + 1}: loss {loss.item():.4f}")

print(pipe.timeline.render(width=90))
