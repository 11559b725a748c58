"""Random draws depend on (seed, step, micro-batch, cell) and on nothing else.

Before a cell runs, its generator is seeded; a recompute seeds the same, so nothing is saved or restored. CPU threads
share one default generator, and sharing it races; there a dispatch mode, which is per thread, hands every random
operator a generator of the thread's own. The mode costs microseconds per operator, so a cell runs under it only where
it may draw: always on the first micro-batch of a mini-batch, later only if it drew then or ever before.

An accelerator that one stage has to itself, of all pipes, needs no mode for draws on it: its default generator is
seeded, and how far that has come tells whether a cell drew.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from types import FrameType
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Generator, Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from gpipe.partitioning.mode import ThreadMode

_MASK = (1 << 64) - 1


_CPU = torch.device("cpu")


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
    device = torch.device(kwargs.get("device") or "cpu")
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


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
    default = _default_of(generator.device)
    with _default_generator_lock:
        callers = default.get_state()
        default.set_state(generator.get_state())
        try:
            return run()
        finally:
            generator.set_state(default.get_state())
            default.set_state(callers)


class _Default(Protocol):
    """What operators draw from that are given no generator."""

    def get_state(self) -> Tensor: ...

    def set_state(self, state: Tensor, /) -> Any: ...


class _OnlyState:
    """The default generator of a device that gives out its state but not itself, as MPS does."""

    def __init__(self, device: torch.device) -> None:
        module = torch.get_device_module(device)
        self.get_state: Callable[[], Tensor] = partial(module.get_rng_state, device)
        self.set_state: Callable[[Tensor], Any] = partial(module.set_rng_state, device=device)


def _default_of(device: torch.device) -> _Default:
    return _default_generator(device) or _OnlyState(device)


def _default_generator(device: torch.device) -> Generator | None:
    """The default generator of a device, None where torch does not give it out."""
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    if not hasattr(module, "default_generators"):
        return None
    if not module.default_generators:  # as CUDA's and XPU's before they are first used
        module.init()
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    generator: Generator = module.default_generators[index]
    return generator


class _Own:
    """The default generator of an accelerator that one stage has to itself."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._position = _offset if _offset_tells(generator.device) else _state
        self._left: object = None
        self.strayed = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Leave it inside as it was before; ``strayed`` then tells of draws outside the cells it was seeded for."""
        before = self._generator.get_state()
        self.strayed, self._left = False, self._position(self._generator)
        try:
            yield
            self.strayed |= self.moved()
        finally:
            self._generator.set_state(before)

    def seed(self, seed: int) -> None:
        """Begin a cell's draws."""
        self.strayed |= self.moved()
        self._generator.manual_seed(seed)
        self._left = self._position(self._generator)

    def moved(self) -> bool:
        """Whether there were draws since it was seeded, or since this was asked."""
        before, self._left = self._left, self._position(self._generator)
        return before != self._left


def _offset(generator: Generator) -> int:
    """How many numbers a counting generator (Philox) has given since it was seeded: read at no cost."""
    return generator.get_offset()


def _state(generator: Generator) -> bytes:
    return generator.get_state().numpy().tobytes()


@cache
def _claim(device: torch.device) -> threading.Lock:
    """Held while a stage draws from the default generator of an accelerator."""
    return threading.Lock()


@cache
def _stages_on(device: torch.device) -> WeakSet[Draws]:
    """Of all pipes of this process."""
    return WeakSet()


_within: ContextVar[bool] = ContextVar("gpipe_within_a_stage", default=False)


@cache
def _offset_tells(device: torch.device) -> bool:
    """Whether draws on a device move their generator's offset; tried, as not all generators have one."""
    generator = Generator(device)
    try:
        before = generator.get_offset()
        torch.empty(1, device=device).uniform_(generator=generator)
        return generator.get_offset() != before
    except (RuntimeError, NotImplementedError):
        return False


class Draws:
    """The random draws of one stage: a scope to run each of its cells in.

    Args:
        cells: Number of cells of the stage.
        device: Where it is.
        alone: Whether no other stage of its pipe is there. While no other pipe's is either, an accelerator's default
            generator serves its draws there, and the mode is for draws on other devices only.
    """

    def __init__(self, cells: int, device: torch.device = _CPU, alone: bool = False) -> None:
        self._drawing = [False] * cells  # under the mode
        self._seeding = [False] * cells  # from the default generator of the stage's own accelerator
        self._device = device
        self._own: _Own | None = None
        if alone and device.type != "cpu" and (generator := _default_generator(device)) is not None:
            self._own = _Own(generator)
        self._modes = {own: CellGenerators(device if own else None) for own in (True, False)}
        self._served = False  # by the default generator
        if device.type != "cpu":
            _stages_on(device).add(self)

    def may_draw(self, cell: int) -> bool:
        """Whether cell number ``cell``, observed before, needs a scope of its own."""
        return self._drawing[cell] or self._seeding[cell]

    @contextmanager
    def cell(self, cell: int, seed: int, observe: bool, brought: Brought, again: bool) -> Iterator[None]:
        """Run cell number ``cell`` of the stage inside; ``observe`` looks whether it draws.

        ``brought`` and ``again`` are for the generators the cell brings, see ``CellGenerators.running``.
        """
        own = self._own if self._served and (observe or self._seeding[cell]) else None
        if own is not None:
            own.seed(seed)
        if observe or self._drawing[cell] or (self._seeding[cell] and not self._served):
            mode = self._modes[self._served]
            with mode.running(seed, brought, again):
                yield
            self._drawing[cell] |= mode.drew
        else:
            yield
        if own is not None:
            self._seeding[cell] |= own.moved()

    @contextmanager
    def guard(self, stage: str) -> Iterator[None]:
        """Leave the default generators as they were, and notice draws that went past the scopes."""
        token = _within.set(True)
        try:
            with self._serving(nested=token.old_value is True):
                before = self._states()
                yield
                past_mode = not all(self._drawing) and not all(map(torch.equal, before, self._states()))
        finally:
            _within.reset(token)
        if past_mode:
            self._drawing = [True] * len(self._drawing)
        strayed = self._served and self._own is not None and self._own.strayed and not all(self._seeding)
        if strayed:
            self._seeding = [True] * len(self._seeding)
        if past_mode or strayed:
            warnings.warn(
                f"torch's default generator moved while {stage} ran: either another thread of yours draws from it, or "
                "a cell drew random numbers in backward, or on this micro-batch and not on the first. If a cell did, "
                "this mini-batch is not reproducible; from now on this stage's draws in forward are seeded per cell.",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextmanager
    def _serving(self, nested: bool) -> Iterator[None]:
        """Inside, the device's default generator serves this stage, unless another pipe has a stage there.

        That one may run in another thread. Draws are the same numbers either way. Who was served before is waited for,
        but not by a pipe that a cell of another one calls (``nested``), which would wait for itself.
        """
        self._served = False
        if self._own is not None and (not nested or self._undisputed()):
            with _claim(self._device):
                if self._undisputed():
                    self._served = True
                    with self._own.kept():
                        yield
                    return
        yield

    def _undisputed(self) -> bool:
        return len(_stages_on(self._device)) == 1

    def _states(self) -> list[Tensor]:
        with _default_generator_lock:  # no other stage's draws are in them
            watched = [_CPU] if self._served or self._device == _CPU else [_CPU, self._device]
            return [_default_of(device).get_state() for device in watched]
