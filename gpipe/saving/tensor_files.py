"""Tensors by key in a folder, as torch.distributed.checkpoint (DCP) has them.

Its planners, writer and reader are called one after the other, as ``dcp.save`` and ``dcp.load`` call them: between
ranks these send pickled tracebacks, and they read ``.metadata`` with a pickle that could run anything.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpipe.saving.together import Together
from gpipe.saving.whole_files import cause

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"

_PARTS = {  # what a pickled Metadata of tensors is made of, beside sizes, types of elements and paths
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # as Python 3.13 writes them
}


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Together) -> None:
    """Write the tensors of all ranks; a key that several ranks have is written once.

    Args:
        folder: Without other tensors in it.
        tensors: Of this rank; may be none. A key stands for the same values on every rank that has it.
        ranks: Those that write, this one among them.

    Raises:
        OSError, RuntimeError: Writing failed on a rank; the same on every rank.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)  # else it asks for a stream of whatever device is there
    planner = DefaultSavePlanner()
    is_first = ranks.rank == 0

    def plan() -> Any:
        planner.set_up_planner(dict(tensors), writer.storage_meta(), is_first)
        writer.set_up_storage_writer(is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    def share(plans: list[Any]) -> Any:
        divided, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(divided), metadata

    def write() -> Any:
        try:
            return writer.write_data(planner.finish_plan(divided[ranks.rank]), planner).wait()
        except RuntimeError as error:
            raise cause(error) from error

    plans = ranks.each(plan)
    divided, metadata = ranks.first(lambda: share(plans))
    written = ranks.each(write)
    ranks.first(lambda: writer.finish(metadata, written))


def own_files(folder: Path, rank: int) -> list[Path]:
    """The files that ``write_tensors`` wrote on one rank."""
    return [*folder.glob(f"__{rank}_*"), *([folder / METADATA] if rank == 0 else [])]


def read_metadata(folder: Path, files: Collection[str]) -> Metadata:
    """What tensors there are, and where.

    Of what the file says, only names, sizes, types and places are taken; nothing in it is run.

    Args:
        folder: Where ``write_tensors`` wrote.
        files: Names of the files that belong to it.

    Raises:
        OSError: The file cannot be read.
        ValueError: It describes something else than whole tensors in these files.
    """
    content = (folder / METADATA).read_bytes()
    try:
        return _metadata(_Unpickler(io.BytesIO(content)).load(), files)
    except Exception as error:  # a strange pickle fails in any way
        reason = str(error) if isinstance(error, (ValueError, pickle.UnpicklingError)) else repr(error)
        raise ValueError(f"{METADATA} does not describe the tensors of a save: {reason}") from error


class _Part:
    """Stands for an object of DCP's: knows what was in it, and can do nothing."""

    state: Any = None

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Gives each file classes of its own, so that not even these can be changed for what comes after."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._parts: dict[str, type[_Part]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if name in _PARTS.get(module, ()):
            return self._parts.setdefault(name, type(name, (_Part,), {}))
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of such a description")


def _metadata(found: Any, files: Collection[str]) -> Metadata:
    """DCP's own description, made of what was found."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    if type(found).__name__ != "Metadata":
        raise ValueError(f"it holds a {type(found).__name__}")
    places = {index.state["fqn"]: info.state for index, info in found.state["storage_data"].items()}
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for key, entry in found.state["state_dict_metadata"].items():
        if type(entry).__name__ != "TensorStorageMetadata":  # DCP reads it with a pickle that could run anything
            raise ValueError(f"{key!r} is no tensor")
        size, (chunk,) = torch.Size(entry.state["size"]), entry.state["chunks"]
        dtype, *_ = entry.state["properties"].state
        origin = torch.Size([0] * len(size))
        if chunk.state != {"offsets": origin, "sizes": size} or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{key!r} is not a whole tensor")
        place = places[key]
        if place["relative_path"] not in files or place.keys() != {"relative_path", "offset", "length"}:
            raise ValueError(f"{key!r} is in {place['relative_path']!r}, which is no file of this save")
        properties = TensorProperties(dtype=dtype)
        entries[key] = TensorStorageMetadata(properties, size, [ChunkStorageMetadata(origin, size)])
        storage[MetadataIndex(key, origin)] = _StorageInfo(**place)
    return Metadata(entries, storage_data=storage)


def read_tensors(folder: Path, metadata: Metadata, keys: Iterable[str]) -> dict[str, Tensor]:
    """Read some of the tensors, to the CPU; no other rank takes part.

    Args:
        folder: Where ``write_tensors`` wrote.
        metadata: Of ``read_metadata``.
        keys: Of ``metadata``.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries = {key: metadata.state_dict_metadata[key] for key in keys}
    tensors: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")  # type: ignore[union-attr]
        for key, entry in entries.items()
    }
    reader, planner = FileSystemReader(folder), DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner(tensors, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    (plan,) = reader.prepare_global_plan(plans)
    reader.read_data(planner.finish_plan(plan), planner).wait()
    return tensors
