"""Files that are whole or not there, such as the weights at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gpipe.saving import whole_files
from gpipe.training.errors import RunError


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
