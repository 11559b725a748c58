"""A folder of saves: each whole or not there, the latest one known by name, damage recognised.

folder/latest                       the name of the save written last
folder/step-000000100/save.json     what there is beside tensors; size and checksum of every file
folder/step-000000100/.metadata     and *.distcp: the tensors, as torch.distributed.checkpoint writes them
folder/.step-000000200.partial/     half-written, by a run that was killed
folder/.step-000000100.replaced/    the save that step-000000100 is taking the place of
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from gpipe.saving.tensor_files import read_metadata
from gpipe.saving.whole_files import replacing, sync

FORMAT = 1
_CONTENT = "save.json"
_LATEST = "latest"
_NAME = re.compile(r"\.?step-(\d{9,})(\.replaced)?")
_LEFT = (".step-*.partial", ".step-*.replaced", f".{_LATEST}.*.partial")
_BLOCK = 1 << 22  # bytes read at once

Files = dict[str, tuple[int, int]]
"""Size in bytes and CRC-32 of every file of a save, by name."""


def path_of(folder: Path, step: int) -> Path:
    """Where the save of a step is."""
    return folder / f"step-{step:09d}"


def partial_of(folder: Path, step: int) -> Path:
    """Where it is while it is written."""
    return folder / f".{path_of(folder, step).name}.partial"


def cleared(partial: Path) -> None:
    """Make the folder to write to, with nothing in it."""
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def summed(paths: Iterable[Path]) -> Files:
    """Sizes and checksums of files, which the disk holds then."""
    files: Files = {}
    for path in paths:
        sync(path)
        files[path.name] = (path.stat().st_size, _checksum(path))
    return files


def publish(folder: Path, step: int, content: Mapping[str, Any], files: Files, keep: int) -> None:
    """Make the save that was written to ``partial_of(folder, step)`` the latest; delete all but the newest ``keep``.

    Saves of later steps can only be damaged ones that a resumed run went back behind; they go too.

    Args:
        folder: Of saves.
        step: Which the save is of.
        content: What else it holds, as JSON.
        files: Of ``summed``, all ranks'.
        keep: How many saves of the steps up to ``step`` stay.
    """
    partial, path = partial_of(folder, step), path_of(folder, step)
    for name, (size, _) in files.items():
        if not (partial / name).is_file() or (partial / name).stat().st_size != size:
            raise OSError(
                f"{partial / name}, which another rank wrote, is not seen from rank 0: give a folder that all hosts "
                "share"
            )
    _write_content(partial / _CONTENT, {"format": FORMAT, "step": step, **content, "files": files})
    sync(partial)
    replaced = path.with_name(f".{path.name}.replaced")
    if path.exists():
        _delete(replaced)
        os.rename(path, replaced)
    os.rename(partial, path)
    sync(folder)
    with replacing(folder / _LATEST) as beside:
        beside.write_text(f"{path.name}\n", encoding="utf-8")
    _sweep(folder, step, keep)


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The latest save that is whole, and what it holds beside tensors; None where there is none at all.

    Args:
        folder: Of saves; need not be there.
        warn: Told what is wrong with each save that is passed over.

    Raises:
        RuntimeError: There are saves, and all are damaged.
    """
    paths = _candidates(folder, warn)
    reasons = []
    for path in paths:
        try:
            return path, _checked(path)
        except (OSError, ValueError) as error:
            reasons.append(str(error))
            warn(f"{path} is damaged ({error}); going back to the save before it")
    if paths:
        raise RuntimeError(
            f"none of the {len(paths)} saves in {folder} can be read (the latest: {reasons[0]}): start again in "
            "another folder"
        )
    return None


def _write_content(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps({**content, "crc32": _own_checksum(content)}, indent=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _own_checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _candidates(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """All saves, the one that ``latest`` names first, then from the newest to the oldest."""
    found = [path for path in (*folder.glob("step-*"), *folder.glob(".step-*.replaced")) if _step(path) >= 0]
    paths = sorted(found, key=lambda path: (_step(path), not path.name.startswith(".")), reverse=True)
    try:
        name = (folder / _LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return paths  # killed before it was written, the first time
    except (OSError, ValueError) as error:
        warn(f"{folder / _LATEST} cannot be read ({error}); taking the newest save")
        return paths
    if name not in [path_of(folder, _step(path)).name for path in paths]:
        warn(f"{folder / _LATEST} names {name[:40]!r}, which is no save there; taking the newest save")
    return sorted(paths, key=lambda path: path_of(folder, _step(path)).name != name)


def _step(path: Path) -> int:
    """The step a save's name says; -1 if it is no such name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _checked(path: Path) -> dict[str, Any]:
    """What a save holds beside tensors, once everything in it has been found whole.

    Raises:
        OSError, ValueError: It is damaged, or not a save.
    """
    try:
        content = json.loads((path / _CONTENT).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{_CONTENT} is no JSON: {error}") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{_CONTENT} is not that of a save")
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}; this version of gpipe reads format {FORMAT}")
    if content.pop("crc32", None) != _own_checksum(content):
        raise ValueError(f"{_CONTENT}: wrong checksum")
    if content["step"] != _step(path):
        raise ValueError(f"it is the save of step {content['step']}")
    for name, (size, checksum) in content["files"].items():
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file")
        if (there := (path / name).stat().st_size) != size:
            raise ValueError(f"{name} has {there} bytes, not {size}")
        if _checksum(path / name) != checksum:
            raise ValueError(f"{name}: wrong checksum")
    read_metadata(path, content["files"])
    return content


def _sweep(folder: Path, step: int, keep: int) -> None:
    """Delete what is not among the newest ``keep`` saves, and what a killed run left half-written."""
    saves = {path: _step(path) for path in folder.glob("step-*") if _step(path) >= 0 and (path / _CONTENT).is_file()}
    kept = sorted(other for other in saves.values() if other <= step)[-keep:]
    leftovers = [path for pattern in _LEFT for path in folder.glob(pattern)]
    for path in [path for path, other in saves.items() if other not in kept] + leftovers:
        try:
            _delete(path)
        except OSError as error:  # the save is there; this is not worth its failure
            warnings.warn(f"{path} cannot be deleted: {error}", stacklevel=2)


def _delete(path: Path) -> None:
    """Delete a folder, or a file; no one ever finds half of it under the name of a save."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    gone = path if path.name.endswith(".partial") else path.with_name(f".{path.name.removeprefix('.')}.gone.partial")
    if path != gone:
        if gone.exists():
            shutil.rmtree(gone)
        os.rename(path, gone)
    shutil.rmtree(gone)
