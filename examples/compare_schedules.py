"""One step under every schedule, as simulated and as run; and a schedule of your own."""

import torch
from torch import nn

import gpipe
from gpipe import schedules

torch.set_num_threads(2)
torch.manual_seed(0)
model = nn.Sequential(*(nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True) for _ in range(4)))
inputs, targets = torch.randn(2, 32, 16, 64)
pipe = gpipe.GPipe(model, [2, 2], devices=["cpu"] * 2, chunks=4)
pipe.train_step(inputs, targets, nn.functional.mse_loss)  # the first step pays for what is made only once

for name in ("gpipe", "gpipe_zero_bubble", "one_f_one_b", "zero_bubble_h1"):
    schedule = schedules.builder(name)(stages=2, micro_batches=4)
    predicted = gpipe.simulate(schedule, gpipe.StageCost(1.0, 1.0, 1.0, activation_bytes=1))
    with gpipe.record(pipe) as measured:
        pipe.zero_grad()
        loss = pipe.train_step(inputs, targets, nn.functional.mse_loss, "micro_batch", schedule=schedule)
    print(f"{name}: loss {loss:.4f}, bubble {predicted.bubble:.0%} if F = I = W, activations {predicted.peak_bytes}")
    print(measured.render(width=90))

F, B = gpipe.Kind.FORWARD, gpipe.Kind.BACKWARD
mine = gpipe.Schedule(
    "one micro-batch after the other",
    stages=2,
    micro_batches=4,
    workers=tuple(tuple(gpipe.Action(k, kind, m) for m in range(4) for kind in (F, B)) for k in range(2)),
)
print(mine.validate().render())
pipe.train_step(inputs, targets, nn.functional.mse_loss, "micro_batch", schedule=mine)
