"""Every contender by its door's name, and what ranks do with one: time it, count its bytes, check its gradients."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import contenders, peers, slices
from benchmarks.contenders import Contender, Door
from benchmarks.match import OUR_CUT

DOORS: dict[str, Door] = {
    "plain": contenders.plain,
    "ceiling": slices.ceiling,
    "GPipe": contenders.on_threads,
    "DistributedGPipe": contenders.on_ranks,
    "torch": slices.torch_pipelining,
    OUR_CUT: slices.torch_pipelining,
    "torchgpipe": peers.torchgpipe,
    "fairscale": peers.fairscale,
}


def timed_step(rank: int, contender: Contender, _: int) -> Callable[[], None]:
    """What ``Ranks`` times."""
    return DOORS[contender.door](rank, contender).step


def peaks_of(rank: int, contender: Contender, _: int) -> Callable[[], dict[int, int]]:
    """For ``Ranks``: peak bytes of this rank's stages; made anew, and gone again."""
    return lambda: DOORS[contender.door](rank, contender).peaks()


def gradients_of(rank: int, contender: Contender, _: int) -> Callable[[], float]:
    """For ``Ranks``: the sum of the squares of this rank's gradients after a step."""

    def run() -> float:
        running = DOORS[contender.door](rank, contender)
        running.step()
        return sum(float(p.grad.double().square().sum()) for p in running.parameters if p.grad is not None)

    return run
