"""A dotted path to a callable, checked against its signature and called."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NotRequired, Required

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import to_json
from typing_extensions import TypedDict

from gpipe.training.problems import close_match, described


class FactoryError(ValueError):
    """A dotted path leads nowhere, or what it leads to cannot be called so; one line in ``problems`` for each fault."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def resolve(path: str) -> Callable[..., Any]:
    """The callable at a dotted path: modules as far as they go, attributes from there on.

    The current directory is searched too, so a user's own ``my_model.build`` needs no installation.

    Raises:
        FactoryError: Naming the part of the path that failed.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise FactoryError(f"{path!r} is no dotted path such as 'my_module.build'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    found: Any = None
    for depth, part in enumerate(parts, start=1):
        is_last = depth == len(parts)
        if found is None or inspect.ismodule(found):
            found = _below_module(found, ".".join(parts[:depth]), prefer_attribute=is_last)
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            reached = ".".join(parts[: depth - 1])
            raise FactoryError(f"{reached!r} has no attribute {part!r}{close_match(part, dir(found))}")
    if not callable(found):
        raise FactoryError(f"{path!r} is of type {type(found).__name__} and cannot be called; name a class or function")
    return typing.cast(Callable[..., Any], found)


def _below_module(parent: ModuleType | None, name: str, prefer_attribute: bool) -> Any:
    """What ``name`` is: a module, or an attribute of its parent module."""
    reached, _, part = name.rpartition(".")
    if prefer_attribute and hasattr(parent, part):
        return getattr(parent, part)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise FactoryError(f"importing {name!r} failed: {located(error)}") from error
    except Exception as error:
        raise FactoryError(f"importing {name!r} failed: {located(error)}") from error
    if hasattr(parent, part):
        return getattr(parent, part)
    if parent is None:
        raise FactoryError(f"there is no module {name!r}, neither installed nor in {Path.cwd()}")
    raise FactoryError(f"{reached!r} has no module or attribute {part!r}{close_match(part, dir(parent))}")


def checked_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], prefix: str, skip: int = 0
) -> dict[str, Any]:
    """Check arguments against a callable's signature and annotations, and bring them to its types (lists to tuples).

    Args:
        function: What is to be called.
        arguments: Plain values by name.
        prefix: Where they stand in the file, for messages.
        skip: Leading parameters that are not the file's to give.

    Raises:
        FactoryError: With a line for each argument that is unknown, missing or of a wrong type.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (ValueError, TypeError):  # written in C and silent about its arguments
        return dict(arguments)
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    adapter = _adapter(function, named, "allow" if takes_any else "forbid")
    try:
        result: dict[str, Any] = adapter.validate_json(to_json(dict(arguments)), strict=True)
    except ValidationError as error:
        names = [p.name for p in named]
        lines = described(error, dict(arguments), lambda path: names if not path else (), prefix)
        raise FactoryError(*lines) from None
    return result


def _adapter(
    function: Callable[..., Any], parameters: list[inspect.Parameter], extra: typing.Literal["allow", "forbid"]
) -> TypeAdapter[Any]:
    hints = _hints(function)
    fields = {}
    for parameter in parameters:
        hint = hints.get(parameter.name, Any)
        required = parameter.default is parameter.empty
        fields[parameter.name] = Required[hint] if required else NotRequired[hint]
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True)
    arguments = TypedDict("arguments", fields)  # type: ignore[misc]
    arguments.__pydantic_config__ = config  # type: ignore[attr-defined]
    return TypeAdapter(arguments)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that pydantic can check; the rest accept anything."""
    described = function.__init__ if inspect.isclass(function) else function
    try:
        hints = typing.get_type_hints(described)
    except Exception:  # a name that exists for type checkers only
        return {}
    return {name: hint for name, hint in hints.items() if _checkable(hint)}


def _checkable(hint: Any) -> bool:
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError as error:
        return error.code == "type-adapter-config-unused"  # a model of pydantic: brings its own config
    except PydanticSchemaGenerationError:
        return False
    return True


def located(error: BaseException) -> str:
    """An exception in a line: its type, its message and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (in {frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
