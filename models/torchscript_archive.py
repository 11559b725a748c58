"""The tensors of a TorchScript archive, read without running anything that is in it.

Such a file is a zip: ``data.pkl`` is a pickle of the module's attributes, whose tensors name the members ``data/0``,
``data/1``, ... that hold their numbers; ``code/`` has the program. ``torch.jit.load`` would compile the program and run
parts of it. Here the pickle may name classes of the archive, which become inert records, and what torch builds tensors
and lists of numbers with, which is done here; any other name is refused.
"""

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a file that is not as it should be may raise."""


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, rather than another zip or no zip at all."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(_below_root(name) == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of an archived module by name, on the CPU.

    Args:
        path: What ``torch.jit.save`` wrote.

    Raises:
        ValueError: the archive is damaged, or asks for more than a module and its tensors.
    """
    found: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            root = _root(archive)
            with archive.open(f"{root}/data.pkl") as file:
                module = _Reader(file, _Storages(archive, root)).load()
            if not isinstance(module, _Record):
                raise ValueError(f"it holds {type(module).__name__}")
            _collect("", module, found)
    except _DAMAGE as error:
        raise ValueError(
            f"expected a TorchScript archive of a module, given {path}: {error}; get the file anew, or convert it to "
            "safetensors where you trust what is in it"
        ) from error
    return found


def _below_root(name: str) -> str:
    return name.partition("/")[2]


def _root(archive: zipfile.ZipFile) -> str:
    """The one folder that everything in the archive is in."""
    names = [name for name in archive.namelist() if _below_root(name) == "data.pkl"]
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} members data.pkl")
    return names[0].partition("/")[0]


def _collect(prefix: str, module: "_Record", found: dict[str, Tensor]) -> None:
    """Tensors among the attributes of a module, and of its children."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, _Record):
            _collect(f"{prefix}{name}.", value, found)


class _Record:
    """What stands for an object of a class of the archive: its attributes and nothing else."""

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):  # else the class had its own idea of a state, which only its code understands
            vars(self).update(state)


class _Storages:
    """The numbers in an archive."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self._archive, self._root = archive, root
        self._read: dict[str, Tensor] = {}
        names = archive.namelist()
        order = archive.read(f"{root}/byteorder").decode() if f"{root}/byteorder" in names else "little"
        if order != sys.byteorder:
            raise ValueError(f"its numbers are {order}-endian, and this machine's are {sys.byteorder}-endian")

    def __call__(self, dtype: torch.dtype, key: str, count: int) -> Tensor:
        """The storage ``key`` as (count,) numbers."""
        if key not in self._read:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            if len(data) != count * dtype.itemsize:
                raise ValueError(f"data/{key} has {len(data)} bytes where {count} of {dtype} are expected")
            self._read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._read[key]


def _tensor(storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: object) -> Tensor:
    """In place of ``torch._utils._rebuild_tensor_v2``; torch refuses what does not lie within the storage."""
    return storage.as_strided(tuple(size), tuple(stride), offset)


def _same(value: object, *_: object) -> object:
    """In place of what tags a list or a dict with its type."""
    return value


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        ("torch.jit._pickle", name): _same
        for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
    },
}


class _Reader(pickle.Unpickler):
    """Unpickles a module; the only names it knows lead to inert records and to functions of this file."""

    def __init__(self, file: Any, storages: _Storages) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for."""
        if module.partition(".")[0] == "__torch__":
            return _Record
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")

    def persistent_load(self, pid: Any) -> Tensor:
        """The storage that a tensor names."""
        _, dtype, key, _, count = pid
        return self._storages(dtype, key, count)
