"""A module built without memory whose values can be made later, part by part.

The factory runs on the meta device, where tensors have shapes but no values. Every operator it calls is written down;
to make the values of a tensor, those operators that led to it are called again, on the CPU. So initialisation in any
constructor is repeated, not only what modules have a ``reset_parameters`` for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Ref:
    """A tensor of the meta device: a view on a storage."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Call(NamedTuple):
    """An operator call.

    Attributes:
        function: The operator.
        args, kwargs: Its arguments, meta tensors as references.
        results: What it gave, meta tensors as references.
        reads, writes: Storages it takes, and those it makes or changes.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Any]
    reads: frozenset[int]
    writes: frozenset[int]


@dataclass
class Recorded:
    """A module on the meta device, and the operators that built it."""

    module: nn.Module
    _calls: list[_Call]
    _storages: dict[int, Any] = field(repr=False)  # alive, so that their numbers stay theirs

    @torch.no_grad()
    def materialise(self, tensors: Iterable[tuple[str, Tensor]], seed: int) -> None:
        """Turn these meta tensors, with all that refers to them, into tensors with values, on the CPU.

        Args:
            tensors: Parameters and buffers with their names; those that have values already stay as they are.
            seed: Of all draws.

        Raises:
            ValueError: A tensor's values did not come from recorded operators.
        """
        unmade = {id(t): (name, t) for name, t in tensors if t.is_meta}
        needed = {_ref(t).storage for _, t in unmade.values()}
        made = self._replayed(needed, seed)
        for name, tensor in unmade.values():
            ref = _ref(tensor)
            if ref.storage not in made:
                raise ValueError(
                    f"the values of {name!r} are not known from building the module on the meta device: compute them "
                    "with torch operators in the constructor, or give a ready module instead of a factory"
                )
            _become(tensor, _view(ref, made))

    @torch.no_grad()
    def allocate(self, tensor: Tensor) -> None:
        """Turn a meta tensor into one whose values are yet to come, on the CPU."""
        _become(tensor, torch.empty_like(tensor, device=_CPU))

    def _replayed(self, needed: set[int], seed: int) -> dict[int, torch.UntypedStorage]:
        """The storages with values."""
        led: list[_Call] = []
        for call in reversed(self._calls):
            if call.writes & needed:
                led.append(call)
                needed = needed | call.reads
        made: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for call in reversed(led):
                args, kwargs = tree_map(
                    lambda x: _view(x, made) if isinstance(x, _Ref) else x, (call.args, call.kwargs)
                )
                if kwargs.get("device") is not None:
                    kwargs["device"] = _CPU
                for ref, result in zip(call.results, tree_leaves(call.function(*args, **kwargs)), strict=True):
                    if isinstance(ref, _Ref):
                        made.setdefault(ref.storage, result.untyped_storage())
        return made


def recorded(factory: Callable[[], nn.Module]) -> Recorded:
    """Call ``factory`` on the meta device.

    Raises:
        TypeError: It gives no module.
    """
    recorder = _Recorder()
    try:
        with torch.device("meta"), _Constants(), recorder:
            module = factory()
    except Exception as error:
        error.add_note(
            "gpipe: raised while the factory ran on the meta device, where tensors have no values: compute numbers "
            "from tensors made with device='cpu', or give a ready module"
        )
        raise
    if not isinstance(module, nn.Module):
        raise TypeError(f"the factory must return an nn.Module, got {type(module).__name__}")
    return Recorded(module, recorder.calls, recorder.storages)


class _Constants(TorchFunctionMode):
    """Keeps the numbers a tensor is made from: the meta device would forget them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is None:
            needs_grad = kwargs.pop("requires_grad", False)
            return func(*args, **{**kwargs, "device": _CPU}).to("meta").requires_grad_(needs_grad)
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down every operator call that takes or gives a meta tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        args_kept, kwargs_kept = tree_map(self._kept, (args, kwargs))
        out = func(*args, **kwargs)
        results = [self._kept(leaf) for leaf in tree_leaves(out)]
        reads = _storages(tree_leaves((args_kept, kwargs_kept)))
        writes = (_storages(results) - reads) | _storages(_written(func, args_kept, kwargs_kept))
        if writes:
            self.calls.append(_Call(func, args_kept, kwargs_kept, results, reads, writes))
        return out

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        ref = _ref(value)
        self.storages[ref.storage] = value.untyped_storage()
        return ref


def _ref(tensor: Tensor) -> _Ref:
    number = tensor.untyped_storage()._cdata
    return _Ref(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _storages(values: Sequence[Any]) -> frozenset[int]:
    return frozenset(value.storage for value in values if isinstance(value, _Ref))


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    found: list[Any] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _view(ref: _Ref, made: dict[int, torch.UntypedStorage]) -> Tensor:
    return torch.empty(0, dtype=ref.dtype, device=_CPU).set_(made[ref.storage], ref.offset, ref.shape, ref.stride)


def _become(tensor: Tensor, value: Tensor) -> None:
    """Make ``tensor``, wherever it is held, the one with values; what it is beside its values stays."""
    if isinstance(tensor, nn.Parameter):
        value = torch.Tensor._make_subclass(type(tensor), value, tensor.requires_grad)
    vars(value).update(vars(tensor))
    torch.utils.swap_tensors(tensor, value)  # type: ignore[no-untyped-call]
