"""A CLIP step whose loss sees the whole mini-batch: pipelines in one pass and in two, and gradients by cached features.

Run: python -m benchmarks.contrastive [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gpipe
from benchmarks.harness import Result, Samples, interleave, report, steady
from gpipe.models.clip import CLIP, clip
from gpipe.models.contrastive import ContrastiveLoss
from gpipe.partitioning.live import LiveBytes

QUESTION = "What does an exact contrastive loss over the whole mini-batch cost in seconds and bytes, and is it exact?"
STAGES = 2


@dataclass(frozen=True)
class Size:
    """The model, the mini-batch, and into how many micro-batches it is split."""

    width: int = 192
    text_width: int = 128
    layers: int = 4
    side: int = 48
    context: int = 32
    rows: int = 96
    chunks: int = 8


SIZES = {"full": Size(), "tiny": Size(width=32, text_width=32, layers=1, side=16, context=4, rows=8, chunks=2)}
Gradients = dict[str, Tensor]
Step = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """A way to make the step.

    Attributes:
        step: Forward, loss and backward, with gradients of the model and of the loss's temperature.
        gradients: Those it left.
        held: Runs a step; gives the bytes every device held at its peak.
    """

    step: Step
    gradients: Callable[[], Gradients]
    held: Callable[[], Sequence[int]]


def made(size: Size) -> tuple[CLIP, ContrastiveLoss]:
    """Model and loss, always the same."""
    torch.manual_seed(0)
    model = clip(
        image_size=size.side,
        patch_size=8,
        vision_width=size.width,
        vision_layers=size.layers,
        vision_heads=size.width // 32,
        text_width=size.text_width,
        text_layers=size.layers,
        text_heads=size.text_width // 32,
        embed_dim=64,
        activation="gelu",
        context_length=size.context,
        vocabulary_size=1000,
    )
    return model, ContrastiveLoss()


def batch(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Images, texts and where these end."""
    torch.manual_seed(1)
    texts = torch.randint(1000, (size.rows, size.context))
    return torch.randn(size.rows, 3, size.side, size.side), texts, torch.full((size.rows,), size.context - 1)


# --- without a pipeline -----------------------------------------------------------------------------------------------


def whole(model: nn.Module, loss: nn.Module, inputs: Any) -> None:
    """The step as written in the paper: everything at once."""
    loss(model(inputs)).backward()


def cached(model: nn.Module, loss: nn.Module, inputs: Sequence[Tensor], chunks: int) -> None:
    """Gradient accumulation with cached features (GradCache, arXiv 2101.06983), plainly.

    All features without a graph; the loss on them and its gradient; then every micro-batch again, and backward from
    its features' gradients. The last micro-batch first, as a pipeline adds up.
    """
    parts = list(zip(*(x.chunk(chunks) for x in inputs), strict=True))
    with torch.no_grad():
        features = [model(part) for part in parts]
    images, texts = (torch.cat(column).requires_grad_() for column in zip(*features, strict=True))
    loss((images, texts)).backward()
    assert images.grad is not None
    assert texts.grad is not None
    gradients = list(zip(images.grad.chunk(chunks), texts.grad.chunk(chunks), strict=True))
    for part, gradient in zip(reversed(parts), reversed(gradients), strict=True):
        torch.autograd.backward(model(part), gradient)


def plain(size: Size, way: Callable[[nn.Module, nn.Module, Any], None]) -> Contender:
    """A contender on one device."""
    model, loss = made(size)
    inputs = batch(size)

    def step() -> None:
        model.zero_grad()
        loss.zero_grad()
        way(model, loss, inputs)

    def held() -> Sequence[int]:
        model.zero_grad()
        loss.zero_grad()
        with LiveBytes() as live:
            way(model, loss, inputs)
        return [max(size for _, size in live.levels) + sum(p.nbytes for p in model.parameters())]

    return Contender(step, partial(_gradients, model, loss), held)


# --- pipelines --------------------------------------------------------------------------------------------------------


def piped(size: Size, checkpoint: Any, two_pass: bool) -> Contender:
    """A contender in two stages, one intra-op thread each."""
    model, loss = made(size)
    inputs = batch(size)
    torch.set_num_threads(STAGES)
    pipe = gpipe.GPipe(model, devices=["cpu"] * STAGES, chunks=size.chunks, checkpoint=checkpoint, sample=inputs)
    torch.set_num_threads(1)

    def step() -> None:
        pipe.zero_grad()
        loss.zero_grad()
        pipe.train_step(inputs, None, loss, two_pass=two_pass)

    def held() -> Sequence[int]:
        with gpipe.record(pipe, memory=True) as timeline:
            step()
        return timeline.peak_bytes

    return Contender(step, partial(_gradients, model, loss), held)


def _gradients(model: nn.Module, loss: nn.Module) -> Gradients:
    named = [*model.named_parameters(), *loss.named_parameters(prefix="loss")]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


# --- report -----------------------------------------------------------------------------------------------------------

WHOLE, CACHED = "one device, whole batch at once", "one device, cached features"


def contenders(size: Size) -> dict[str, Contender]:
    """All of them."""
    return {
        WHOLE: plain(size, whole),
        CACHED: plain(size, partial(cached, chunks=size.chunks)),
        "two stages, one pass, nothing recomputed": piped(size, "never", two_pass=False),
        "two stages, one pass, all recomputed": piped(size, "always", two_pass=False),
        "two stages, two passes": piped(size, "never", two_pass=True),
    }


def exactness(ways: dict[str, Contender]) -> Result:
    """Every gradient against those of the step at once, and bit by bit against cached features."""
    found = {}
    for name, way in ways.items():
        way.step()
        found[name] = way.gradients()
    rows = []
    for name, gradients in found.items():
        assert list(gradients) == list(found[WHOLE])
        furthest = max(_difference(g, found[WHOLE][key]) for key, g in gradients.items())
        same = sum(torch.equal(g, found[CACHED][key]) for key, g in gradients.items())
        scale = gradients["loss.logit_scale"]
        rows.append([name, f"{furthest:.1e}", f"{same} of {len(gradients)}", f"{float(scale):.9g}"])
    columns = "way|furthest gradient from the whole batch's|equal to cached features' to the bit|of logit_scale".split(
        "|"
    )
    note = (
        "Furthest: of all parameters, logit_scale among them, the largest norm of the difference over the gradient's "
        "norm; float32 rounds at 6e-8. The whole batch at once adds up in another order than micro-batches do."
    )
    return Result("Is every gradient exact?", columns, rows, note)


def _difference(a: Tensor, b: Tensor) -> float:
    size = b.double().norm()
    return float((a.double() - b.double()).norm() / size) if size else float(a.double().norm())


def costs(ways: dict[str, Contender], samples: dict[str, Samples], size: Size) -> tuple[Result, Figure]:
    """Seconds and bytes."""
    rows, peaks = [], {}
    for name, way in ways.items():
        peaks[name] = way.held()
        low, high = samples[name].spread
        seconds = samples[name].median
        rows.append(
            [
                name,
                f"{seconds:.3f} ({low:.3f} to {high:.3f})",
                f"{samples[CACHED].median / seconds:.2f}",
                " ".join(f"{peak / 2**20:.1f}" for peak in peaks[name]),
            ]
        )
    columns = ["way", "seconds a step", "speed-up over cached features", "peak MiB of every device"]
    note = (
        f"ViT of {size.layers} layers, d {size.width}, {size.side} x {size.side} pixels by 8; text of {size.layers} "
        f"layers, d {size.text_width}, {size.context} tokens; {size.rows} pairs in {size.chunks} micro-batches; one "
        "intra-op thread a stage and one on one device. Bytes: counted storages with parameters and gradients, "
        "without optimizer; what the loss makes of the features is in those of one device alone. Two passes compute "
        "forward twice, as cached features do. Not shown: batches of thousands, whose features and similarities "
        "outweigh the model, and GPUs."
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in ways:
        axes.scatter(max(peaks[name]) / 2**20, samples[name].median, label=name)
    axes.set(xlabel="MiB of the fullest device", ylabel="seconds a step", xlim=(0, None), ylim=(0, None))
    axes.set_title("An exact contrastive step")
    axes.legend(fontsize="small")
    return Result("Seconds and bytes of a step", columns, rows, note), figure


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=list(SIZES), default="full")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = SIZES[given.size]
    ways = contenders(size)
    exact = exactness(ways)
    samples = interleave({name: steady(way.step) for name, way in ways.items()}, given.rounds)
    measured, figure = costs(ways, samples, size)
    report("contrastive", [measured, exact], samples, figure=figure)


if __name__ == "__main__":
    main()
