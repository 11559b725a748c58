"""Building of the simulated accelerators' native part: on first use, into a folder for this torch and this Python."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

BUILD = "GPIPE_SIMULATED_BUILD"
"""Environment variable with the folder to build in, instead of ``gpipe`` in the user's cache."""

_NAME = "gpipe_sim"
_SOURCES = Path(__file__).parent / "native"
_FLAGS = ["-O1", "-g0", "-DNDEBUG"]  # NDEBUG as torch itself: the layout of its classes depends on it
NOT_STARTED = "this process has no simulated accelerators: call gpipe.testing.accelerators.start() first"
_native: Any = None


class BuildError(RuntimeError):
    """The native part cannot be built here; the message is one line that says what to do."""


def native() -> Any:
    """The native part.

    Raises:
        RuntimeError: It was not loaded.
    """
    if _native is None:
        raise RuntimeError(NOT_STARTED)
    return _native


def load() -> Any:
    """The native part, built where this machine has not yet.

    Raises:
        BuildError: Something is missing.
    """
    global _native
    if _native is None:
        _native = _loaded(_folder())
    return _native


def _folder() -> Path:
    """Where it is built: other sources, another torch or another Python have another folder."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in sorted([*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + source.read_bytes())
    cache = os.environ.get(BUILD) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gpipe").expanduser()
    return Path(cache, f"sim-{torch.__version__}-{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}")


def _loaded(folder: Path) -> Any:
    if not folder.exists():
        try:
            with _environment("PATH", _path_of_this_python()):
                _refuse_what_is_missing()
                with _alone(folder):
                    if not folder.exists():
                        return _build(folder)
        except OSError as error:
            message = f"the simulated accelerators cannot be built in {folder.parent} ({error.strerror}): name a folder"
            raise BuildError(f"{message} that can be written in the environment variable {BUILD}") from None
    return _imported(folder)


def _imported(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location(_NAME, folder / f"{_NAME}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _refuse_what_is_missing() -> None:
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    compiler = _words_of_compiler()[0]
    missing = []
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler, {compiler} (install g++)")
    if shutil.which("ninja") is None:
        missing.append("ninja (pip install ninja)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append(f"the headers of Python (install {python}-dev)")
    if missing:
        raise BuildError(
            f"the simulated accelerators are built on first use, and this machine lacks {', '.join(missing)}"
        )


def _words_of_compiler() -> list[str]:
    """What to call, such as ``g++ -m64``, without ccache in front: some versions of torch put it there themselves."""
    command = os.environ.get("CXX", "c++")
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        words = []
    if len(words) > 1 and Path(words[0]).name in ("ccache", "sccache"):
        words = words[1:]
    return words or [command]


@contextlib.contextmanager
def _environment(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _path_of_this_python() -> str:
    """As if its environment were activated: ninja may be there alone."""
    return os.pathsep.join(filter(None, [sysconfig.get_path("scripts"), os.environ.get("PATH")]))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; the lock of one that dies is free again."""
    import fcntl  # not on Windows, where this module can be imported all the same

    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> Any:
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as scratch:
        built = Path(scratch, folder.name)
        built.mkdir()
        try:
            with _environment("CXX", _one_word(_words_of_compiler(), Path(scratch))):
                module = _compiled(built)
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            log = folder.with_name(folder.name + ".log")
            log.write_text(str(error))
            first = next((line for line in str(error).splitlines() if "error:" in line), str(error).splitlines()[0])
            raise BuildError(f"the simulated accelerators could not be built, all of it in {log}: {first}") from None
        built.rename(folder)
    return module


def _one_word(compiler: list[str], folder: Path) -> str:
    """The same as one program: torch takes no more, or takes several words for one, depending on its version."""
    if len(compiler) == 1:
        return compiler[0]
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@"\n')
    script.chmod(0o755)
    return str(script)


def _compiled(folder: Path) -> Any:
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would say that this machine has no CUDA
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils import cpp_extension

            sources = [str(source) for source in sorted(_SOURCES.glob("*.cpp"))]
            return cpp_extension.load(_NAME, sources, build_directory=str(folder), extra_cflags=_FLAGS)
    finally:
        logger.setLevel(level)
