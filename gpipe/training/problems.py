"""pydantic's findings, retold as lines that name the key, what was given and what is allowed."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]

_WORDS = {
    "Input should": "should",
    "an object": "a mapping",
    "a valid array": "a list",
    "a valid string": "text",
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "Value error, ": "",
}
_NOT_IN_A_FILE = "wants an object that no file can hold; leave it out, or wrap the callable in one of your own"


def described(
    error: ValidationError, given: object, allowed: Callable[[Path], Sequence[str]], prefix: str = ""
) -> list[str]:
    """One line for each key at fault.

    Args:
        error: what pydantic found.
        given: the values it looked at.
        allowed: the keys (or, for a union, the names) allowed at a path.
        prefix: where ``given`` stands in the file, e.g. ``model.arguments``.

    Returns:
        lines ``key: what is wrong``.
    """
    found: dict[str, list[str]] = {}
    for details in error.errors(include_url=False):
        path = _path(details, given)
        key = ".".join(map(str, (*filter(None, [prefix]), *path))) or "the file"
        found.setdefault(key, []).append(_what(details, path, allowed))
    return [f"{key}: {_joined(whats)}" for key, whats in found.items()]


def close_match(word: object, words: Iterable[str]) -> str:
    """``; did you mean 'stages'?``, or nothing where no word comes near."""
    by_folded = {known.casefold(): known for known in words}
    matches = difflib.get_close_matches(str(word).casefold(), by_folded, n=1)
    return f"; did you mean {by_folded[matches[0]]!r}?" if matches else ""


def allowed_keys(annotation: Any, path: Path, given: Any) -> list[str]:
    """The keys a model of pydantic has at a path below it; the names, where a union does not yet know which it is."""
    models = list(_models(annotation))
    if len(models) > 1:
        names = {name: model for model in models for name in get_args(model.model_fields["name"].annotation)}
        name = given.get("name") if isinstance(given, dict) else None
        if name not in names:
            return list(names)
        models = [names[name]]
    if not models:
        return []
    fields = models[0].model_fields
    if not path:
        return list(fields)
    if path[0] not in fields:
        return []
    return allowed_keys(fields[str(path[0])].annotation, path[1:], _below(given, path[0]))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _models(part)


def _below(value: Any, key: str | int) -> Any:
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return None


def _path(details: ErrorDetails, given: Any) -> Path:
    """The keys of the file on pydantic's way to an error, which also names the branches of unions."""
    path: list[str | int] = []
    location = details["loc"]
    for i, key in enumerate(location):
        is_last = i == len(location) - 1
        here = key in given if isinstance(given, dict) else isinstance(given, list) and isinstance(key, int)
        if here or (is_last and details["type"] == "missing"):
            path.append(key)
            given = _below(given, key)
    if details["type"].startswith("union_tag"):
        path.append("name")
    return tuple(path)


def _what(details: ErrorDetails, path: Path, allowed: Callable[[Path], Sequence[str]]) -> str:
    kind, value = details["type"], details["input"]
    if kind == "needs_python_object":
        return _NOT_IN_A_FILE
    if kind == "missing" or kind == "union_tag_not_found":
        names = allowed(path[:-1]) if kind == "union_tag_not_found" else ()
        return "is required" + (f": one of {', '.join(names)}" if names else "")
    if kind == "extra_forbidden":
        keys = allowed(path[:-1])
        return f"unknown key, given {shown(value)}{close_match(path[-1], keys)} (allowed here: {', '.join(keys)})"
    if kind == "union_tag_invalid":
        names = allowed(path[:-1])
        tag = details["ctx"]["tag"]
        return f"should be one of {', '.join(names)}, given {shown(tag)}{close_match(tag, names)}"
    message = details["msg"]
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message if kind == "value_error" else f"{message}, given {shown(value)}"


def _joined(whats: list[str]) -> str:
    """Several findings about one key are the branches of a union: each says what would have done."""
    whats = [what for what in whats if what != _NOT_IN_A_FILE] or whats
    if len(whats) == 1:
        return whats[0]
    stems = [what.rpartition(", given ")[0] or what for what in whats]
    given = whats[-1].rpartition(", given ")[2]
    unique = list(dict.fromkeys(stem.removeprefix("should be ") for stem in stems))
    return f"should be {' or '.join(unique)}, given {given}"


def shown(value: object) -> str:
    """A value as in the file, cut where long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
