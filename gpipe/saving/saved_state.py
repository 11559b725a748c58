"""What is trained (module, loss, optimizer) as plain values and tensors by key, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gpipe.distributed import DistributedGPipe
from gpipe.saving import saved_optimizer
from gpipe.saving.plain_values import JSON, decoded, encoded
from gpipe.saving.saved_optimizer import Names

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

_NAMED = 3  # keys in a message
_EXTRA = "_extra_state"  # ends the key of what a module's get_extra_state() gave, which may be of any kind

State = dict[str, Any]
"""JSON: ``model`` and ``loss`` by name, ``optimizer`` of ``saved_optimizer``; tensors are ``{"tensor": key}``."""


@dataclass(frozen=True)
class Part:
    """One rank's part of a state, without the values of its tensors.

    Attributes:
        state: What it has.
        shapes: Type of elements and shape of every tensor, by key.
        whole: Names of the whole module's state, all ranks' together.
    """

    state: State
    shapes: dict[str, tuple[str, list[int]]]
    whole: frozenset[str]


class Trained:
    """Module, loss and optimizer of this rank.

    Args:
        module: A ``DistributedGPipe``, whose slice it is then, a ``GPipe``, or any other module.
        optimizer: Of its parameters and the loss's; None leaves it out.
        loss_fn: Left out for a ``DistributedGPipe``, which knows its own. What is no module has no state.

    Raises:
        TypeError, ValueError: These are not what is described here.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer | None, loss_fn: Any) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if not isinstance(optimizer, Optimizer | None):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
        if isinstance(module, DistributedGPipe) and loss_fn is not None:
            raise ValueError("a DistributedGPipe has its own loss: leave loss_fn out")
        loss = module.loss_fn if isinstance(module, DistributedGPipe) else loss_fn
        self.module, self.optimizer = module, optimizer
        self.loss: nn.Module | None = loss if isinstance(loss, nn.Module) else None
        self.names = _names(module, self.loss)
        self.whole = module.state_keys if isinstance(module, DistributedGPipe) else frozenset(module.state_dict())

    def part(self, copied: bool) -> tuple[Part, dict[str, Tensor]]:
        """What there is to save on this rank: its description, and the tensors by key.

        Args:
            copied: Copy the tensors to the CPU; else they are those that training goes on with.

        Raises:
            TypeError, ValueError: There is something that a save cannot hold.
        """
        tensors: dict[str, Tensor] = {}

        def put(key: str, tensor: Tensor) -> JSON:
            _check_plain(key, tensor)
            if key in tensors:
                raise ValueError(f"two tensors would both be saved as {key!r}: rename what one of them belongs to")
            tensors[key] = tensor.detach()
            return key

        state: State = {
            "model": _described(self.module, "model", put),
            "loss": {} if self.loss is None else _described(self.loss, "loss", put),
            "optimizer": None,
        }
        if self.optimizer is not None:
            state["optimizer"] = saved_optimizer.described(self.optimizer, self.names, put)
        if copied:
            tensors = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
        shapes = {key: (_type(tensor), list(tensor.shape)) for key, tensor in tensors.items()}
        return Part(state, shapes, self.whole), tensors

    def check(self, saved: State, metadata: Metadata) -> None:
        """Compare this rank's part with a save.

        Raises:
            ValueError: They do not fit; the message names keys.
        """
        missing, foreign = self.whole - saved["model"].keys(), saved["model"].keys() - self.whole
        if missing or foreign:
            raise ValueError(
                "it is of another module: "
                + " and ".join(
                    [f"it lacks {_some(missing)}"] * bool(missing)
                    + [f"the module here has no {_some(foreign)}"] * bool(foreign)
                )
                + ": build the module as it was built then, or give another folder"
            )
        _check_shapes(self.module, "model", saved["model"], metadata)
        if self.loss is not None:
            _check_shapes(self.loss, "loss", saved["loss"], metadata)
        if self.optimizer is not None:
            saved_optimizer.check_type(saved["optimizer"], self.optimizer)

    def claims(self) -> tuple[set[str], set[str] | None]:
        """Names of the loss's state, and of the optimizer's parameters, on this rank; None without an optimizer."""
        loss = set() if self.loss is None else set(self.loss.state_dict())
        if self.optimizer is None:
            return loss, None
        return loss, set(chain.from_iterable(saved_optimizer.parameter_names(self.optimizer, self.names)))

    def keys(self, saved: State) -> list[str]:
        """Keys of the tensors that this rank needs."""
        keys: list[str] = []
        self._values(saved, lambda key: keys.append(key) or Tensor())  # type: ignore[func-returns-value]
        return keys

    def load(self, saved: State, tensors: Mapping[str, Tensor]) -> None:
        """Take over what was saved; it has passed ``check``."""
        model, loss, optimizer = self._values(saved, tensors.__getitem__)
        self.module.load_state_dict(model)
        if self.loss is not None:
            self.loss.load_state_dict(loss)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(optimizer)

    def undo(self) -> Callable[[], None]:
        """A call that puts all back to what it is now, past the hooks that may have made loading fail."""
        modules = [(module, _copied(module)) for module in (self.module, self.loss) if module is not None]
        optimizer = self.optimizer
        kept = {} if optimizer is None else {"state": optimizer.state, "param_groups": optimizer.param_groups}

        def put_back() -> None:
            if optimizer is not None:
                optimizer.__setstate__(kept)  # loading has made new ones
            for module, values in modules:
                _put_back(module, values)

        return put_back

    def _values(self, saved: State, take: Callable[[Any], Tensor]) -> tuple[State, State, State]:
        model = {name: decoded(saved["model"][name], take) for name in self.module.state_dict()}
        loss, optimizer = {}, {}
        if self.loss is not None:
            loss = {name: decoded(saved["loss"][name], take) for name in self.loss.state_dict()}
        if self.optimizer is not None:
            optimizer = saved_optimizer.restored(saved["optimizer"], self.optimizer, self.names, take)
        return model, loss, optimizer


def joined(parts: Sequence[Part]) -> State:
    """The parts of all ranks as one state.

    Raises:
        ValueError: They do not fit together.
    """
    seen: dict[str, tuple[int, tuple[str, list[int]]]] = {}
    for rank, part in enumerate(parts):
        for key, shape in part.shapes.items():
            other, other_shape = seen.setdefault(key, (rank, shape))
            if other_shape != shape:
                raise ValueError(
                    f"{key!r} is {_spoken(*other_shape)} on rank {other} and {_spoken(*shape)} on rank {rank}: ranks "
                    "that have the same name must have the same values"
                )
    state = {
        kind: {name: value for part in reversed(parts) for name, value in part.state[kind].items()}
        for kind in ("model", "loss")
    }
    whole = frozenset(chain.from_iterable(part.whole for part in parts))
    if missing := whole - state["model"].keys():
        raise ValueError(
            f"these ranks lack {_some(missing)} of the module: all ranks of a DistributedGPipe must save together"
        )
    return {**state, "optimizer": saved_optimizer.joined([part.state["optimizer"] for part in parts])}


def check_claims(saved: State, claims: Sequence[tuple[set[str], set[str] | None]]) -> None:
    """Compare what all ranks together hold of the loss and the optimizer with a save.

    Raises:
        ValueError: They do not fit; the message names keys.
    """
    loss = set(chain.from_iterable(loss for loss, _ in claims))
    held = [names for _, names in claims if names is not None]
    if loss - saved["loss"].keys() or (saved["loss"].keys() - loss and (held or loss)):
        raise ValueError(
            f"its loss has {_some(saved['loss']) or 'no state'}, the loss here {_some(loss) or 'no state'}: give the "
            "loss it was written with (loss_fn=)"
        )
    if not held:
        return
    names = set(chain.from_iterable(held))
    there = set(chain.from_iterable(group["parameters"] for group in saved["optimizer"]["groups"]))
    if names != there:
        raise ValueError(
            "its optimizer has other parameters: "
            + " and ".join(
                [f"it lacks {_some(names - there)}"] * bool(names - there)
                + [f"the optimizer here has no {_some(there - names)}"] * bool(there - names)
            )
            + ": give the optimizer the parameters it had, or read the save without it"
        )


def _names(module: nn.Module, loss: nn.Module | None) -> Names:
    names: dict[nn.Parameter, str] = {}
    of_loss = () if loss is None else loss.named_parameters("loss_fn")
    for name, parameter in chain(module.named_parameters(), of_loss):
        names.setdefault(parameter, name)
    if len(set(names.values())) < len(names):
        raise ValueError("a part of the module is called loss_fn, as the loss's parameters are: rename it")
    return names


def _described(module: nn.Module, kind: str, put: Callable[[str, Tensor], JSON]) -> dict[str, JSON]:
    return {name: encoded(value, f"{kind}.{name}", put) for name, value in module.state_dict().items()}


def _copied(module: nn.Module) -> State:
    return {name: copy.deepcopy(v.detach() if isinstance(v, Tensor) else v) for name, v in module.state_dict().items()}


def _put_back(module: nn.Module, values: State) -> None:
    for name, value in module.state_dict().items():
        if isinstance(value, Tensor):
            value.copy_(values[name])
    if not all(isinstance(value, Tensor) for value in values.values()):
        module.load_state_dict(values)


def _check_plain(key: str, tensor: Tensor) -> None:
    plain = tensor.detach()
    if type(plain) is not Tensor or tensor.is_meta or tensor.is_quantized or str(tensor.layout) != "torch.strided":
        what = "a tensor on the meta device" if tensor.is_meta else f"a {type(plain).__name__} of {tensor.layout}"
        raise TypeError(f"{key!r} is {what}, but a save holds plain dense tensors: give the module's own values")


def _check_shapes(module: nn.Module, kind: str, saved: Mapping[str, Any], metadata: Metadata) -> None:
    for name, value in module.state_dict().items():
        if name not in saved or name.rpartition(".")[2] == _EXTRA or not isinstance(value, Tensor):
            continue
        entry: Any = metadata.state_dict_metadata[f"{kind}.{name}"]
        here, there = (_type(value), list(value.shape)), (_name(entry.properties.dtype), list(entry.size))
        if here != there:
            raise ValueError(
                f"{kind}.{name} is {_spoken(*there)} in it, but {_spoken(*here)} here: build the module as it was "
                "built then; cast it after reading"
            )


def _type(tensor: Tensor) -> str:
    return _name(tensor.dtype)


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _spoken(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} of shape {tuple(shape)}"


def _some(names: Collection[str]) -> str:
    """A few of the names."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(map(repr, ordered[:_NAMED])) + more
