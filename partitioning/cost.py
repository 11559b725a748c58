"""What one cell costs for one micro-batch, and the YAML file that carries these numbers between machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, cast

_FORMAT = "gpipe.costs"
_VERSION = 1


@dataclass(frozen=True)
class SkipCost:
    """Bytes of a value that a cell stashes and a later one pops, for one micro-batch.

    Attributes:
        cells_on: How many cells further on it is popped: 1 for the next cell.
        value_bytes: What is sent where that cell belongs to another stage.
        kept_bytes: Of that, what autograd keeps for the cell that pops it. None if not known: all of it.
        handed_on_bytes: What only that cell's graph keeps: activations of a stage that both cells belong to.
        gradient_bytes: Its gradient, as it is sent back. None if not known: as large as the value.
        gradient_storage_bytes: What holds that where it is computed, often with others. None if not known: as much.

    Raises:
        ValueError: A number is negative, not finite, or no number; bytes are not whole; ``cells_on`` is not at least 1.
    """

    cells_on: int
    value_bytes: int
    kept_bytes: int | None = None
    handed_on_bytes: int = 0
    gradient_bytes: int | None = None
    gradient_storage_bytes: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            object.__setattr__(self, field.name, _number(f"skip: {field.name}", value, whole=True))
        if self.cells_on < 1:
            raise ValueError(f"skip: cells_on: expected 1 or more, got {self.cells_on}: only a later cell can pop it")

    @property
    def kept(self) -> int:
        """Of the value what autograd keeps for the cell that pops it, in bytes."""
        return self.value_bytes if self.kept_bytes is None else min(self.kept_bytes, self.value_bytes)

    @property
    def gradient(self) -> int:
        """Its gradient as it is sent back, in bytes."""
        return self.value_bytes if self.gradient_bytes is None else self.gradient_bytes

    @property
    def passing(self) -> int:
        """What waits while cells run that it passes over, the value or what holds its gradient, in bytes."""
        storage = self.gradient if self.gradient_storage_bytes is None else self.gradient_storage_bytes
        return max(self.value_bytes, storage)


@dataclass(frozen=True)
class CellCost:
    """Seconds and bytes of one cell, for one micro-batch.

    Every byte has one owner, so that a stage's bytes are the sum over its cells: a cell owns its output, and what
    enters a stage belongs to the cell before it or, for the first cell, to the model's input.

    Attributes:
        name: What messages call the cell.
        forward_seconds: One forward; a recompute takes as long.
        backward_seconds: One backward, without recompute.
        activation_bytes: What stays allocated from the cell's forward to its backward: the storages autograd keeps,
            each once, and the output where this or the next cell keeps it. Neither parameters nor the cell's input.
        boundary_bytes: The cell's output: what would be sent, and kept on the other side, were the next cell the first
            of another stage. Its gradient is taken to be of the same size.
        parameter_bytes: The cell's parameters.
        workspace_bytes: What the cell needs beyond all that while it runs forward or backward and gives back
            afterwards: temporaries, the gradients of its output and of its input.
        kept_input_bytes: Of the cell's input, what autograd keeps for the cell. None if not known: all of it.
        handed_on_bytes: Of ``activation_bytes``, the output as far as only the next cell's graph keeps it: it does not
            stay if that cell belongs to another stage.
        skips: What it stashes for later cells.

    Raises:
        ValueError: A number is negative, not finite, or no number; bytes are not whole.
    """

    name: str
    forward_seconds: float
    backward_seconds: float
    activation_bytes: int
    boundary_bytes: int
    parameter_bytes: int
    workspace_bytes: int = 0
    kept_input_bytes: int | None = None
    handed_on_bytes: int = 0
    skips: tuple[SkipCost, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "skips", tuple(self.skips))
        if wrong := [skip for skip in self.skips if not isinstance(skip, SkipCost)]:
            raise ValueError(f"cell {self.name!r}: skips: expected SkipCosts, got {_brief(wrong[0])} among them")
        for key in _NUMBERS:
            if key == "kept_input_bytes" and self.kept_input_bytes is None:
                continue
            whole = key.endswith("_bytes")
            object.__setattr__(self, key, _number(f"cell {self.name!r}: {key}", getattr(self, key), whole))


_NUMBERS = tuple(field.name for field in fields(CellCost) if field.name not in ("name", "skips"))


@dataclass(frozen=True)
class Profile:
    """The costs of a model's cells, and what they were taken from.

    Attributes:
        cells: One for every cell, in order.
        input_bytes: One micro-batch of the model's input: what enters the first stage.
        micro_batch_rows: Rows of the micro-batch these costs are for; None if not known.
        device: Where they were measured, in words; None if not known.

    Raises:
        ValueError: There is no cell, or a number is not one.
    """

    cells: tuple[CellCost, ...]
    input_bytes: int = 0
    micro_batch_rows: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple(self.cells))
        if not self.cells:
            raise ValueError("a profile needs at least one cell, got none")
        object.__setattr__(self, "input_bytes", _number("input_bytes", self.input_bytes, whole=True))
        if self.micro_batch_rows is not None:
            rows = _number("micro_batch_rows", self.micro_batch_rows, whole=True)
            if rows < 1:
                raise ValueError(f"micro_batch_rows: expected 1 or more, got {rows}")
            object.__setattr__(self, "micro_batch_rows", rows)


def save_costs(
    path: str | Path,
    costs: Sequence[CellCost],
    *,
    input_bytes: int = 0,
    micro_batch_rows: int | None = None,
    device: str | None = None,
) -> None:
    """Write costs as YAML, for ``load_costs`` on this or another machine.

    Args:
        path: The file, replaced if it exists.
        costs: One for every cell, in order.
        input_bytes: One micro-batch of the model's input.
        micro_batch_rows: Rows of the micro-batch the costs are for.
        device: Where they were measured, in words.

    Raises:
        ValueError: There is no cell, or a number is not one.
        ImportError: PyYAML is not installed.
    """
    yaml = _yaml()
    profile = Profile(tuple(costs), input_bytes, micro_batch_rows, device)
    head = {"format": _FORMAT, "version": _VERSION}
    about = {key: value for key, value in asdict(profile).items() if key != "cells" and value is not None}
    cells = [{k: v for k, v in asdict(cell).items() if k != "skips" or v} for cell in profile.cells]
    text = yaml.safe_dump({**head, **about, "cells": cells}, sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def load_costs(path: str | Path) -> Profile:
    """Read what ``save_costs`` wrote, or what a person wrote in its form.

    Args:
        path: The YAML file.

    Raises:
        ValueError: The file is not such a file; the message names file, cell and key.
        ImportError: PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    try:
        return _profile(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _profile(content: Any) -> Profile:
    if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
        raise ValueError(
            f"expected a file of cell costs with 'format: {_FORMAT}' at its top, got {_brief(content)}: "
            "write one with gpipe.partitioning.cost.save_costs"
        )
    if content.get("version") != _VERSION:
        raise ValueError(
            f"version: expected {_VERSION}, got {content.get('version')!r}: profile again with this version of gpipe"
        )
    about = [field.name for field in fields(Profile) if field.name != "cells"]
    _check_keys("the file", content, required=["format", "version", "cells"], allowed=about)
    cells = content["cells"]
    if not isinstance(cells, list) or not cells:
        raise ValueError(f"cells: expected a list of at least one cell, got {_brief(cells)}")
    if not isinstance(content.get("device"), str | None):
        raise ValueError(f"device: expected words, got {content['device']!r}")
    parsed = tuple(_cell(index, cell) for index, cell in enumerate(cells))
    return Profile(parsed, **{key: content[key] for key in about if key in content})


def _cell(index: int, content: Any) -> CellCost:
    if not isinstance(content, Mapping):
        raise ValueError(f"cells[{index}]: expected keys and values, got {_brief(content)}")
    where = f"cells[{index}] ({content.get('name', 'unnamed')!r})"
    optional = ["workspace_bytes", "kept_input_bytes", "handed_on_bytes", "skips"]
    required = [field.name for field in fields(CellCost) if field.name not in optional]
    _check_keys(where, content, required, allowed=optional)
    if not isinstance(content["name"], str):
        raise ValueError(f"{where}: name: expected text, got {content['name']!r}: put it in quotes")
    skips = _skips(where, content.get("skips", []))
    try:
        return CellCost(**{**content, "skips": skips})
    except ValueError as error:
        raise ValueError(f"cells[{index}]: {error}") from error


def _skips(where: str, content: Any) -> tuple[SkipCost, ...]:
    if not isinstance(content, list):
        raise ValueError(f"{where}: skips: expected a list, got {_brief(content)}")
    names = [field.name for field in fields(SkipCost)]
    for skip in content:
        if not isinstance(skip, Mapping):
            raise ValueError(f"{where}: skips: expected keys and values, got {_brief(skip)}")
        _check_keys(f"{where}: skips", skip, names[:2], names[2:])
    try:
        return tuple(SkipCost(**skip) for skip in content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_keys(where: str, content: Mapping[Any, Any], required: Sequence[str], allowed: Sequence[str]) -> None:
    missing = [key for key in required if key not in content]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing: add it")
    unknown = [key for key in content if key not in (*required, *allowed)]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is not a key: use {', '.join((*required, *allowed))}")


def _number(what: str, value: Any, whole: bool) -> Any:
    """A finite number from 0, as int or float."""
    unit = "a whole number of bytes" if what.endswith("_bytes") else "a whole number" if whole else "seconds"
    remedy = ": write 1.0e-5 or 0.00001, YAML reads 1e-5 as text" if isinstance(value, str) else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{what}: expected {unit}, 0 or more, got {value!r}{remedy}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite or value < 0:
        raise ValueError(f"{what}: expected {unit}, 0 or more and finite, got {value!r}: measure it again")
    if not whole:
        return float(value)
    if not isinstance(value, Integral) and not float(value).is_integer():
        raise ValueError(f"{what}: expected {unit}, got {value!r}: round it up")
    return int(cast(Any, value))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _yaml() -> Any:
    """PyYAML, which the library itself does without."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("cost files need PyYAML: pip install pyyaml") from error
    return yaml
