"""From a YAML file and ``--set key=value`` to a checked configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gpipe.training.config import Configuration
from gpipe.training.errors import ConfigurationError
from gpipe.training.problems import allowed_keys, described


class _Loader(yaml.SafeLoader):
    """Plain YAML with the three surprises taken out: double keys, ``1e-3`` as text, and dates."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that stands twice (plain YAML silently takes the last) or is no text (such as ``on``)."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(
                    problem="a key that is not text; write it in quotes", problem_mark=key.start_mark
                )
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice in one mapping"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_configuration(file: Path, overrides: Sequence[str] = ()) -> Configuration:
    """Read, override and check a configuration; factories and the optimizer are checked by `checking`.

    Args:
        file: the YAML file.
        overrides: ``key=value`` each, the key dotted, the value in YAML.

    Returns:
        The configuration, its defaults filled in.

    Raises:
        ConfigurationError: If the file cannot be read, is no YAML, or a key, type or value is wrong.
    """
    values = _read_yaml(file)
    for override in overrides:
        _override(values, override)
    return validate(values, file)


def validate(values: dict[str, Any], source: object) -> Configuration:
    """Check plain values against `Configuration`, naming ``source`` and the key in what is wrong."""
    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(source, [f"holds a value that is not plain data: {error}"]) from error
    try:  # as JSON: strict about "4" and true, generous about lists for tuples and text for paths
        return Configuration.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = described(error, values, lambda path: allowed_keys(Configuration, path, values))
        raise ConfigurationError(source, problems) from None


def dump(configuration: Configuration) -> str:
    """The configuration as YAML with every default written out."""
    return yaml.safe_dump(configuration.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_values(file: Path) -> Any:
    """The values of a YAML file.

    Raises:
        ConfigurationError: It is not there, cannot be read, or is no YAML.
    """
    try:
        return parse_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(file, ["there is no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(file, [f"cannot be read: {error}"]) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(file, [yaml_problem(error)]) from None


def _read_yaml(file: Path) -> dict[str, Any]:
    values = read_values(file)
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ConfigurationError(file, [f"{what}; expected a mapping with the keys {', '.join(_sections())}"])
    return values


def parse_yaml(text: str) -> Any:
    """The values of a YAML text; a key that stands twice is refused."""
    return yaml.load(text, Loader=_Loader)


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a text, and where, in a line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"is no valid YAML: {' '.join(str(error).split())}"
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    source = f"--set {override}"
    if not equals or not all(parts):
        raise ConfigurationError(source, ["expected key=value, such as pipeline.stages=4"])
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigurationError(source, [f"the value is no valid YAML: {yaml_problem(error)}"]) from None
    section = values
    for depth, part in enumerate(parts[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            where = ".".join(parts[:depth])
            raise ConfigurationError(source, [f"{where} holds a value, not a mapping with keys below it"])
    section[parts[-1]] = value


def _sections() -> list[str]:
    return list(Configuration.model_fields)
