"""Files that are whole or not there: saves to resume from, and the weights at the end."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpipe import whole_files
from gpipe.training.errors import RunError

KEPT = 2
FORMAT = 1


class Save(TypedDict):
    """What a run needs to go on to the same bits.

    ``step`` counts the optimizer steps done, ``pipe_step`` the pipe's training forwards; random draws follow from it.
    What ``written_with`` names may change the bits though the configuration does not.
    """

    format: int
    step: int
    pipe_step: int
    model: dict[str, Any]
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    written_with: dict[str, str]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what was written takes ``path``'s place at once, or not at all.

    Raises:
        RunError: If writing fails, as on a full disk. What stood at ``path`` before stands there still.
    """
    try:
        with whole_files.replacing(path) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be written: {error}; nothing that was there before is lost") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_save(folder: Path, save: Save) -> Path:
    """Write a save, then delete all but the newest `KEPT` of the steps up to it.

    Saves of later steps can only be damaged ones that a resumed run went back behind; they go too.

    Raises:
        RunError: If writing fails; the saves before are then untouched.
    """
    path = folder / f"step-{save['step']:09d}.pt"
    with replacing(path) as beside, open(beside, "wb") as file:
        _torch_save(save, file)
        file.flush()
    steps = {_step_of(other): other for other in folder.glob("step-*.pt")}
    kept = sorted(step for step in steps if step <= save["step"])[-KEPT:]
    for step, other in steps.items():
        if step not in kept:
            other.unlink(missing_ok=True)
    for leftover in folder.glob(".*.partial"):  # of a run that was killed while it wrote
        leftover.unlink(missing_ok=True)
    return path


def _torch_save(save: Save, file: Any) -> None:
    try:
        torch.save(save, file)
    except RuntimeError as error:
        raise whole_files.cause(error) from error.__cause__


def _step_of(path: Path) -> int:
    digits = path.stem.removeprefix("step-")
    return int(digits) if digits.isdecimal() else -1


def newest_save(folder: Path, warn: Callable[[str], None]) -> Save | None:
    """The newest save that can be read; None where there is none at all.

    Args:
        folder: Where `write_save` wrote.
        warn: Told about each damaged save that is passed over.

    Raises:
        RunError: If there are saves but none can be read.
    """
    paths = sorted(folder.glob("step-*.pt"), key=_step_of, reverse=True)
    for path in paths:
        try:
            return _read_save(path)
        except ValueError as error:
            warn(f"{path} is damaged ({error}); going back to the save before it")
    if paths:
        raise RunError(f"none of the saves in {folder} can be read; start again in another output folder")
    return None


def _read_save(path: Path) -> Save:
    """Read a save; torch does not look at the checksums it writes, so they are checked first.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise ValueError(f"{member}: wrong checksum")
        save: Save = torch.load(path, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # bad zip, bad pickle, unreadable file: torch and zipfile have many names for it
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    if not isinstance(save, dict) or save.get("format") != FORMAT or not save.keys() >= Save.__required_keys__:
        raise ValueError("not a save of this version of gpipe")
    return save


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights as safetensors under their names; the same weights give the same bytes.

    Raises:
        RunError: If writing fails.
    """
    with replacing(path) as beside:
        save_file(_own_storage(weights), beside, metadata={"format": "pt"})


def _own_storage(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights on the CPU, each in memory of its own: safetensors knows no tied weights."""
    seen: set[int] = set()
    own = {}
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        own[name] = tensor if whole and pointer not in seen else tensor.clone()
        seen.add(pointer)
    return own


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read weights by name, on the CPU.

    Raises:
        RunError: If the file is missing, damaged, or no safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise RunError(f"there is no {path}") from None
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
