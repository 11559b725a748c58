"""Skip connections between distant cells, with torchgpipe's names.

A cell yields what a later one will need, or asks for it; the value goes straight from stage to stage:

    @skippable(stash=["features"])
    class Down(nn.Module):
        def forward(self, x):
            yield stash("features", x)
            return self.layers(x)

    @skippable(pop=["features"])
    class Up(nn.Module):
        def forward(self, x):
            features = yield pop("features")
            return self.layers(torch.cat([x, features], 1))

In an ``nn.Sequential`` outside a pipeline the same cells do the same.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from gpipe.partitioning.cells import cells_of
from gpipe.partitioning.skips import Key, carrier, skips_of

Class = TypeVar("Class", bound=type[nn.Module])


class stash(NamedTuple):  # read as a command: yield stash("x", x)
    """Yielded by a forward: hand ``value``, a tensor or None, to the cell that pops ``name``."""

    name: str
    value: Tensor | None


class pop(NamedTuple):
    """Yielded by a forward: give what was stashed as ``name``."""

    name: str


class Namespace:
    """Keeps the names of one part of a model apart from the same names in another; see ``isolate``.

    Copies and pickles of it are the same namespace.
    """

    __slots__ = ("_id",)

    def __init__(self) -> None:
        self._id = uuid.uuid4()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Namespace) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"<Namespace {self._id}>"


def skippable(stash: Iterable[str] = (), pop: Iterable[str] = ()) -> Callable[[Class], Class]:
    """Make a module class stash and pop: its ``forward`` yields ``stash(name, value)`` and ``pop(name)``.

    Names and shapes of parameters stay as they are. Every declared name must be stashed, and popped, in every forward;
    it may be stashed as None.

    Args:
        stash: Names that forward stashes.
        pop: Names that it pops.

    Raises:
        TypeError: A list of names is none, or what is decorated is no module class.
        ValueError: A name is in both lists.
    """
    stashed, popped = _names("stash", stash), _names("pop", pop)
    if both := sorted(stashed & popped):
        raise ValueError(f"{', '.join(map(repr, both))}: a module cannot stash and pop the same name: use two names")

    def extend(cls: Class) -> Class:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"skippable decorates a class of modules, got {cls!r}")
        extended: Class = _extended(cls, stashed, popped)
        return extended

    return extend


def _names(what: str, names: Iterable[str]) -> frozenset[str]:
    found = None if isinstance(names, str) else frozenset(names)
    if found is None or not all(isinstance(name, str) for name in found):
        raise TypeError(f'{what} must be a list of names, such as {what}=["features"], got {names!r}')
    return found


def _extended(cls: Any, stashed: frozenset[str], popped: frozenset[str]) -> Any:
    """A subclass that performs what ``forward`` yields."""
    original = cls.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _performed(self, original(self, *args, **kwargs), stashed, popped)

    def declared(self: nn.Module, what: str) -> list[Key]:
        return [_key(self, name) for name in sorted(stashed if what == "stashed" else popped)]

    def isolate(self: nn.Module, namespace: Namespace, *, only: Iterable[str] | None = None) -> nn.Module:
        """Move this module's names, or ``only`` these, into ``namespace``; returns the module."""
        chosen = stashed | popped if only is None else _names("only", only)
        if unknown := sorted(chosen - stashed - popped):
            raise ValueError(
                f"only: {', '.join(map(repr, unknown))} is neither stashed nor popped by {cls.__name__}, which has "
                f"{', '.join(map(repr, sorted(stashed | popped)))}"
            )
        vars(self)["_namespaces"] = {**vars(self).get("_namespaces", {}), **dict.fromkeys(chosen, namespace)}
        return self

    body = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {**body, "forward": forward, "isolate": isolate, "_gpipe_skips": declared})


def _key(module: nn.Module, name: str) -> Key:
    return vars(module).get("_namespaces", {}).get(name), name


def _performed(module: nn.Module, running: Any, stashed: frozenset[str], popped: frozenset[str]) -> Any:
    """Run a forward that yields to its end; a forward that does not is its own result."""
    if not isinstance(running, Generator):
        _check_all(module, stashed, popped, set())
        return running
    done: set[str] = set()
    answer: Tensor | None = None
    try:
        while True:
            command = running.send(answer)
            answer = _obeyed(module, command, stashed, popped)
            if command.name in done:
                raise RuntimeError(f"{type(module).__name__} stashed or popped {command.name!r} twice: do it once")
            done.add(command.name)
    except StopIteration as end:
        result = end.value
    finally:
        running.close()
    _check_all(module, stashed, popped, done)
    return result


def _obeyed(module: nn.Module, command: Any, stashed: frozenset[str], popped: frozenset[str]) -> Tensor | None:
    where = type(module).__name__
    if isinstance(command, stash):
        if command.name not in stashed:
            raise RuntimeError(f"{where} stashes {command.name!r}, which it does not declare: add it to stash=[...]")
        if not isinstance(command.value, Tensor | None):
            raise TypeError(
                f"{where} stashes a {type(command.value).__name__} as {command.name!r}: stash a tensor, or None"
            )
        carrier().put(_key(module, command.name), command.value)
        return None
    if isinstance(command, pop):
        if command.name not in popped:
            raise RuntimeError(f"{where} pops {command.name!r}, which it does not declare: add it to pop=[...]")
        try:
            return carrier().take(_key(module, command.name))
        except KeyError:
            raise RuntimeError(
                f"{where} pops {command.name!r}, but no cell before has stashed it: see verify_skippables"
            ) from None
    raise TypeError(f"{where}.forward yields {command!r}: yield stash(name, value) or pop(name)")


def _check_all(module: nn.Module, stashed: frozenset[str], popped: frozenset[str], done: set[str]) -> None:
    for verb, names in (("stash", stashed - done), ("pop", popped - done)):
        if names:
            raise RuntimeError(
                f"{type(module).__name__} declares {', '.join(map(repr, sorted(names)))} but did not {verb} it: "
                f"yield {verb}(...) in every forward" + (", None where there is nothing" if verb == "stash" else "")
            )


def verify_skippables(module: nn.Module) -> None:
    """Check that every name stashed in ``module`` is popped once, by a later cell, and the other way round.

    Args:
        module: An ``nn.Sequential``, or a module with ``cells()``; skippable modules may stand anywhere in its cells.

    Raises:
        TypeError: They do not match; the message lists every mismatch.
    """
    skips_of(cells_of(module))
