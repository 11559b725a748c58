"""Random draws depend on (seed, step, micro-batch, cell) and on nothing else.

Before a cell runs, its generator is seeded; a recompute seeds the same, so nothing is saved or restored. CPU threads
share one default generator, and sharing it races; there a dispatch mode, which is per thread, hands every random
operator a generator of the thread's own. The mode costs microseconds per operator, so a cell runs under it only where
it may draw: always on the first micro-batch of a mini-batch, later only if it drew then or ever before.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Generator, Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from gpipe.partitioning.mode import ThreadMode

_MASK = (1 << 64) - 1


def cell_seed(seed: int, step: int, micro_batch: int, cell: int) -> int:
    """The seed of one cell's draws on one micro-batch, in [0, 2**63).

    ``torch.manual_seed(cell_seed(...))`` before each cell of a plain loop gives the draws of the pipeline.
    """
    state = 0
    for part in (seed, step, micro_batch, cell):
        state = _mix((state + 0x9E3779B97F4A7C15 + part) & _MASK)
    return state >> 1


def _mix(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014): every input bit moves every output bit."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


Brought = dict[Generator, Tensor]  # generators of a cell's own, and their states before its forward drew from them


class CellGenerators(ThreadMode):
    """Hands every random operator of this thread a generator seeded for the cell that runs."""

    supports_higher_order_operators = True

    def __init__(self, own: torch.device | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew = False
        self._own = own
        self._seed = 0
        self._generators: dict[torch.device, Generator] = {}
        self._fresh: set[torch.device] = set()
        self._brought: Brought = {}
        self._met: Brought = {}
        self._again = False
        self._recording = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled cells stay compiled; the operators that their kernels call are seen."""
        return True

    @contextmanager
    def running(self, seed: int, brought: Brought, again: bool) -> Iterator[None]:
        """Run a cell inside: its first draw on each device seeds that device's generator.

        Args:
            seed: The seed.
            brought: Filled with the generators the cell brings; or, if it runs ``again``, what forward filled it with.
            again: This is a recompute: brought generators draw what they drew in forward, and forget it afterwards.
        """
        self.drew = False
        self._seed, self._brought, self._again, self._recording = seed, brought, again, torch.is_grad_enabled()
        self._fresh.clear()
        self._met.clear()
        try:
            with self:
                yield
        finally:
            for generator, state in self._met.items() if again else ():
                generator.set_state(state)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, with the cell's own generator if it draws."""
        kwargs = kwargs or {}
        draw = _draw_of(func)
        if draw is None or not draw.happens(args, kwargs):
            return func(*args, **kwargs)
        if (own := draw.generator_of(args, kwargs)) is not None:
            self._meet(own)
            return func(*args, **kwargs)
        device = _device_of(args, kwargs)
        if device == self._own:
            return func(*args, **kwargs)
        if self._recording and _inside_torch_checkpoint():
            raise RuntimeError(
                "a cell draws random numbers inside torch.utils.checkpoint, whose recompute would not repeat them: "
                "leave that out, and let GPipe(checkpoint='always') recompute the cells of this stage"
            )
        self.drew = True
        generator = self._generator(device)
        if draw.overload is not None:
            return draw.overload(*args, **{**kwargs, "generator": generator})
        return _with_default(generator, lambda: func(*args, **kwargs))

    def _meet(self, generator: Generator) -> None:
        """A draw from a generator the cell brought: in a recompute, the first starts where forward's first started."""
        self.drew = True
        if generator in self._met:
            return
        self._met[generator] = generator.get_state()
        if self._again and generator in self._brought:
            generator.set_state(self._brought[generator])
        elif not self._again:
            self._brought[generator] = self._met[generator]

    def _generator(self, device: torch.device) -> Generator:
        if device not in self._generators:
            self._generators[device] = Generator(device)
        if device not in self._fresh:
            self._generators[device].manual_seed(self._seed)
            self._fresh.add(device)
        return self._generators[device]


class _Draw:
    """What is to be known of a random operator: how to give it a generator, and when it draws nothing."""

    def __init__(self, func: Any) -> None:
        arguments = func._schema.arguments if isinstance(func, OpOverload) else ()
        names = [argument.name for argument in arguments]
        self._positions = {name: i for i, name in enumerate(names)}
        self.overload: Callable[..., Any] | None = None
        if isinstance(func, OpOverload):
            self.overload = func if "generator" in names else _generator_overload(func)

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self._positions.get(name)
        if position is not None and position < len(args):
            return args[position]
        return kwargs.get(name)

    def happens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Attention operators are marked random though they draw only when told to drop out."""
        return "dropout_p" not in self._positions or bool(self._argument("dropout_p", args, kwargs))

    def generator_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator | None:
        generator: Generator | None = self._argument("generator", args, kwargs)
        return generator


@cache
def _draw_of(func: Any) -> _Draw | None:
    if not isinstance(func, OpOverload):
        return _Draw(func)  # an operator of higher order: what it runs may draw
    if torch.Tag.nondeterministic_seeded not in func.tags or func is torch.ops.aten._fused_sdp_choice.default:
        return None
    return _Draw(func)


def _generator_overload(func: Any) -> Callable[..., Any] | None:
    """The overload of the same operator that takes the same arguments and a generator, if there is one."""
    packet = func.overloadpacket
    wanted = [str(a.type) for a in func._schema.arguments]
    for name in packet.overloads():
        overload = getattr(packet, name)
        arguments = overload._schema.arguments
        if [str(a.type) for a in arguments if a.name != "generator"] == wanted and len(arguments) > len(wanted):
            found: Callable[..., Any] = overload
            return found
    return None


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            return value.device
    return torch.device(kwargs.get("device") or "cpu")


def _inside_torch_checkpoint() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


_default_generator_lock = threading.Lock()


def _with_default(generator: Generator, run: Callable[[], Any]) -> Any:
    """Run an operator that draws from its device's default generator only, with ``generator``'s state in it."""
    default = _default_generator(generator.device)
    with _default_generator_lock:
        callers = default.get_state()
        default.set_state(generator.get_state())
        try:
            return run()
        finally:
            generator.set_state(default.get_state())
            default.set_state(callers)


def _default_state() -> Tensor:
    with _default_generator_lock:  # no other stage's draws are in it
        return torch.default_generator.get_state()


def _default_generator(device: torch.device) -> Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    generator: Generator = torch.get_device_module(device).default_generators[index]
    return generator


class Draws:
    """The random draws of one stage: a scope to run each of its cells in.

    Args:
        cells: Number of cells of the stage.
        own: An accelerator no other stage uses. Its default generator is seeded before every cell, whether it draws or
            not; the mode is then for draws on other devices only.
    """

    def __init__(self, cells: int, own: torch.device | None = None) -> None:
        self._drawing = [False] * cells
        self._own = None if own is None else _default_generator(own)
        self._mode = CellGenerators(own)

    def may_draw(self, cell: int) -> bool:
        """Whether cell number ``cell``, observed before, needs a scope of its own."""
        return self._own is not None or self._drawing[cell]

    @contextmanager
    def cell(self, cell: int, seed: int, observe: bool, brought: Brought, again: bool) -> Iterator[None]:
        """Run cell number ``cell`` of the stage inside; ``observe`` looks whether it draws.

        ``brought`` and ``again`` are for the generators the cell brings, see ``CellGenerators.running``.
        """
        if self._own is not None:
            self._own.manual_seed(seed)
        if not (observe or self._drawing[cell]):
            yield
            return
        with self._mode.running(seed, brought, again):
            yield
        self._drawing[cell] |= self._mode.drew

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Leave the default generators as they were, and notice draws that went past the mode."""
        before = _default_state()
        own = None if self._own is None else self._own.get_state()
        try:
            yield
        finally:
            if self._own is not None and own is not None:
                self._own.set_state(own)
        if not all(self._drawing) and not torch.equal(before, _default_state()):
            self._drawing = [True] * len(self._drawing)
            warnings.warn(
                f"torch's default generator moved while {stage} ran: either another thread of yours draws from it, or "
                "a cell drew random numbers in backward, or on this micro-batch and not on the first. If a cell did, "
                "this mini-batch is not reproducible; from now on this stage's draws in forward are seeded per cell.",
                RuntimeWarning,
                stacklevel=2,
            )
