"""Tensors by key in a folder, as torch.distributed.checkpoint (DCP) has them.

Its planners, writer and reader are called one after the other, as ``dcp.save`` and ``dcp.load`` call them: between
ranks these send pickled tracebacks, and they read ``.metadata`` with a pickle that could run anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpipe.together import Together
from gpipe.whole_files import cause

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"

_CLASSES = {  # all that a pickled Metadata of tensors is made of, beside types of elements and paths
    *((("torch.distributed.checkpoint.metadata", name)) for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING", "BytesStorageMetadata",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


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
    """What tensors there are, and where; nothing that the file says is run.

    Args:
        folder: Where ``write_tensors`` wrote.
        files: Names of the files that belong to it.

    Raises:
        ValueError: It describes something else than whole tensors in these files.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        for key in metadata.state_dict_metadata:
            _check_entry(metadata, key, files)
    except Exception as error:  # a strange pickle fails in any way
        raise ValueError(f"{METADATA} does not describe the tensors of a save: {error}") from error
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            return PurePath  # where it was written; Python 3.13 has these in another module
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of such a description")


def _check_entry(metadata: Metadata, key: str, files: Collection[str]) -> None:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    entry = metadata.state_dict_metadata[key]
    if not isinstance(entry, TensorStorageMetadata):  # DCP reads it with a pickle that could run anything
        raise ValueError(f"{key!r} is no tensor")
    (chunk,) = entry.chunks
    origin = torch.Size([0] * len(entry.size))
    if (chunk.offsets, chunk.sizes) != (origin, entry.size) or not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"{key!r} is not a whole tensor")
    info = metadata.storage_data[MetadataIndex(key, origin)]
    if info.relative_path not in files or info.transform_descriptors:
        raise ValueError(f"{key!r} is in {info.relative_path!r}, which is no file of this save")


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
