"""Known traps of accelerators: each must be out of the way, or be refused by name."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gpipe
from benchmarks.device_parts.bench import Bench, CannotRun, part

WIDTH = 64


def linears(count: int = 4) -> nn.Sequential:
    """As many, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(count)))


def small(bench: Bench, stages: int, **options: Any) -> gpipe.GPipe:
    """A pipe of small products, all of its stages on one device."""
    return gpipe.GPipe(linears(), [4 // stages] * stages, devices=[bench.device] * stages, **{"chunks": 2} | options)


@part(90, correctness=True)
def traps(bench: Bench) -> None:
    """Known traps: streams, threads of the engine, generators, the current device, captured graphs."""
    found: list[Callable[[Bench], tuple[bool, str]]] = [
        other_stream,
        devices_of_the_caller,
        no_number,
        graphed_callables,
        compiled_with_graphs,
        reentrant,  # last: where it hangs, autograd's thread of the device hangs
    ]
    for trap in found:
        what = (trap.__doc__ or "").rstrip(".")
        bench.begin(trap.__name__)
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                there, how = trap(bench)
        except CannotRun as reason:
            bench.say(what=what, not_looked_at=str(reason))
            continue
        races = bench.races()
        how = how or "; ".join(dict.fromkeys(str(w.message).splitlines()[0][:120] for w in warned))
        bench.check(what, not (there or races), there=there, how=how, **({"races": races[:3]} if races else {}))
    bench.begin(None)


def other_stream(bench: Bench) -> tuple[bool, str]:
    """Input gradients race where backward is called under another stream than forward."""
    pipe = small(bench, 2, chunks=1, checkpoint="never")
    x = torch.randn(4096, WIDTH, device=bench.device)
    weight = torch.ones(WIDTH, device=bench.device, requires_grad=True)
    here, side = torch.accelerator.current_stream(bench.device), torch.Stream(bench.device)

    def late(gradient: Tensor) -> None:
        if bench.device.type == "cuda":
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]

    def gradient(stream: torch.Stream | None) -> Tensor:
        weight.grad = None
        hidden = x * weight
        if stream is None:
            y = pipe(hidden)
        else:
            stream.wait_event(here.record_event())
            with stream:
                y = pipe(hidden)
            here.wait_event(stream.record_event())
            hidden.record_stream(stream)
            y.record_stream(here)
            y.register_hook(late)
        y.sum().backward()
        bench.synchronize()
        assert weight.grad is not None
        return weight.grad.clone()

    right = gradient(None)
    return any(not torch.equal(gradient(side), right) for _ in range(3)), ""


def devices_of_the_caller(bench: Bench) -> tuple[bool, str]:
    """Current device or stream of the caller are others after a pipe has run."""
    count = torch.accelerator.device_count()
    other = torch.device(bench.device.type, count - 1)
    before = torch.accelerator.current_device_index(), torch.accelerator.current_stream()
    gpipe.GPipe(linears(), [4], devices=[other])(torch.randn(4, WIDTH)).sum().backward()
    after = torch.accelerator.current_device_index(), torch.accelerator.current_stream()
    return before != after, f"a pipe on {other}"


class Draws(nn.Module):
    """Draws twice: on the device of its input, and on the device that is named without a number."""

    def forward(self, x: Tensor) -> Tensor:
        """Both, stacked."""
        return torch.stack([torch.rand(4, device=x.device), torch.rand(4, device=x.device.type)]) + 0 * x.sum()


def no_number(bench: Bench) -> tuple[bool, str]:
    """torch.rand(device=type) repeats what torch.rand(device=x.device) drew."""
    first, second = gpipe.GPipe(nn.Sequential(Draws()), [1], devices=[bench.device], seed=1)(torch.ones(2, 4))
    return bool(torch.equal(first, second)), ""


def reentrant(bench: Bench) -> tuple[bool, str]:
    """A backward that begins in a thread of the engine hangs."""
    done: list[str] = []
    pipe = small(bench, 2)

    def run() -> None:
        x = torch.randn(8, WIDTH, device=bench.device, requires_grad=True)
        try:
            checkpoint(pipe, x, use_reentrant=True).sum().backward()
            done.append("runs")
        except RuntimeError as error:
            done.append(f"refused: {error}"[:200])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    return not done, "".join(done)


def needs_graphs(bench: Bench) -> None:
    """Refuse a device that captures no graphs."""
    if bench.device.type != "cuda":
        raise CannotRun("needs CUDA, which captures graphs")


def graphed_callables(bench: Bench) -> tuple[bool, str]:
    """Cells of torch.cuda.make_graphed_callables give wrong gradients."""
    needs_graphs(bench)
    cells, x = linears(2).to(bench.device), torch.randn(8, WIDTH, device=bench.device)
    cells(x).square().mean().backward()
    expected = [p.grad for p in cells.parameters()]
    cells.zero_grad()
    samples = [torch.randn(2, WIDTH, device=bench.device, requires_grad=k > 0) for k in range(2)]
    graphed = nn.Sequential(*(torch.cuda.make_graphed_callables(c, (s,)) for c, s in zip(cells, samples, strict=True)))
    try:
        pipe = gpipe.GPipe(graphed, [1, 1], devices=[bench.device] * 2, chunks=4, checkpoint="never")
        pipe(x).square().mean().backward()
    except (RuntimeError, TypeError, ValueError) as error:
        return False, f"refused: {error}"[:200]
    return differ(expected, pipe), "runs"


def compiled_with_graphs(bench: Bench) -> tuple[bool, str]:
    """Cells of torch.compile(mode="reduce-overhead") give wrong gradients."""
    needs_graphs(bench)
    cells, x = linears(2).to(bench.device), torch.randn(8, WIDTH, device=bench.device)
    cells(x).square().mean().backward()
    expected = [p.grad for p in cells.parameters()]
    cells.zero_grad()
    try:
        compiled = nn.Sequential(*(torch.compile(cell, mode="reduce-overhead") for cell in cells))
        pipe = gpipe.GPipe(compiled, [1, 1], devices=[bench.device] * 2, chunks=4, checkpoint="never")
        for _ in range(3):
            pipe.zero_grad()
            pipe(x).square().mean().backward()
    except Exception as error:  # before 2.13 an AssertionError of torch's in threads that are not the main one
        return False, f"raises {type(error).__name__}: {error}"[:200]
    return differ(expected, pipe), "runs"


def differ(expected: list[Tensor | None], pipe: gpipe.GPipe) -> bool:
    """Whether gradients are others than by rounding."""
    return any(
        a is None or b.grad is None or not torch.allclose(a, b.grad, rtol=1e-3, atol=1e-4)
        for a, b in zip(expected, pipe.parameters(), strict=True)
    )
