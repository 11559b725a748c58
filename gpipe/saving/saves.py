"""Saves of a training run, written and read by any number of ranks."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gpipe.saving import saved_state
from gpipe.saving.plain_values import JSON
from gpipe.saving.save_folder import cleared, newest, partial_of, path_of, publish, summed
from gpipe.saving.saved_state import Part, Trained
from gpipe.saving.tensor_files import own_files, read_metadata, read_tensors, write_tensors
from gpipe.saving.together import Together


@dataclass(frozen=True)
class Restored:
    """What was read.

    Attributes:
        step: The step it was written at.
        extra: What was given as ``extra``.
        path: The save.
    """

    step: int
    extra: dict[str, Any]
    path: Path


class Saves:
    """A folder of saves: module, loss and optimizer under the module's own names.

    What any number of ranks writes, any other number reads, as do ``GPipe`` and the bare module in one process; the
    tensors are in ``torch.distributed.checkpoint``'s format, as ``model.<name>``, ``loss.<name>`` and
    ``optimizer.state.<parameter>.<key>``. A save is there whole or not at all; ``latest`` names the last one.

    Made and called on every rank alike, and all ranks must see the same folder. Random draws go on to the same bits if
    the pipe's step is kept too: ``extra={"pipe_step": pipe.step}``, and set again after reading.

    Args:
        folder: Made when it is first written to.
        keep: How many saves stay, at least 1.
        group: Ranks that save together. None takes all there are; without a process group this process is alone.

    Raises:
        TypeError, ValueError: An argument is not what is described here.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, group: dist.ProcessGroup | None = None) -> None:
        if type(keep) is not int or keep < 1:
            raise ValueError(f"keep must be a whole number of at least 1, got {keep!r}")
        self.folder, self.keep = Path(folder).absolute(), keep
        self._ranks = Together(group)
        self._thread: threading.Thread | None = None
        self._failed: list[BaseException] = []  # of the save in the background, until someone is told
        weakref.finalize(self, _tell, self._failed)

    def write(
        self,
        step: int,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        loss_fn: nn.Module | None = None,
        extra: Mapping[str, JSON] | None = None,
        wait: bool = True,
    ) -> Path:
        """Write a save. A save of the same step is replaced, saves of later steps are deleted.

        Args:
            step: How many steps were done, at least 0; names the save.
            module: A ``DistributedGPipe``, of which every rank saves its part, a ``GPipe``, or any other module.
            optimizer: Of the module's and the loss's parameters.
            loss_fn: The loss, if it has parameters; a ``DistributedGPipe`` knows its own.
            extra: JSON to keep with it; rank 0's is written.
            wait: Come back when it is there. Else it is copied to CPU memory now and written while training goes on;
                a program's end waits for it, but call ``wait()`` before ``destroy_process_group()``.

        Returns:
            The folder where it is, or will be.

        Raises:
            TypeError, ValueError: There is something that cannot be saved, or ranks differ; raised on every rank.
            OSError, RuntimeError: It could not be written, the same on every rank; the saves before are as they were.
                Or the save before it, begun with ``wait=False``, could not.
        """
        self.wait()
        tensors: dict[str, Tensor] = {}

        def part() -> tuple[int, Part, dict[str, Any]]:
            _check_step(step)
            own, values = Trained(module, optimizer, loss_fn).part(copied=not wait)
            tensors.update(values)
            return step, own, _checked_extra(extra)

        parts = self._ranks.each(part)
        if len(steps := sorted({given for given, _, _ in parts})) > 1:
            raise ValueError(f"all ranks must save the same step, but they were given {', '.join(map(str, steps))}")
        state = saved_state.joined([own for _, own, _ in parts])
        content = {"torch": str(torch.__version__), "extra": parts[0][2], "state": state}
        if wait:
            self._write(step, content, tensors)
        else:
            self._thread = threading.Thread(
                target=self._write_behind, args=(step, content, tensors), name=f"gpipe-save-{step}", daemon=False
            )
            self._thread.start()
        return path_of(self.folder, step)

    def wait(self) -> None:
        """Wait until the save begun with ``wait=False``, if any, is there.

        Raises:
            OSError, RuntimeError: It could not be written; the saves before are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed:
            raise self._failed.pop()

    def read(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        loss_fn: nn.Module | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> Restored | None:
        """Read the latest save that is whole into module, loss and optimizer.

        Args:
            module: As for ``write``, with the same names, shapes and types; how it was divided does not matter.
            optimizer: As for ``write``; how its groups' parameters were divided among ranks does not matter. None
                leaves it as it is.
            loss_fn: As for ``write``; may be left out together with the optimizer.
            warn: Told, on rank 0, what is wrong with each damaged save that is passed over.

        Returns:
            What was read; None where there is no save at all.

        Raises:
            RuntimeError: There are saves, but none is whole.
            TypeError, ValueError: The save is of something else. Raised on every rank, as all others; nothing has
                been changed then.
        """
        self.wait()
        mine: list[Trained] = []
        self._ranks.each(lambda: mine.append(Trained(module, optimizer, loss_fn)))
        (trained,) = mine
        found = self._ranks.first(lambda: newest(self.folder, warn))
        if found is None:
            return None
        path, content = found
        try:
            self._load(path, content, trained)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            kind = next(kind for kind in (OSError, TypeError, ValueError, RuntimeError) if isinstance(error, kind))
            raise kind(f"{path} cannot be read here: {error}") from error
        return Restored(content["step"], content["extra"], path)

    def _load(self, path: Path, content: dict[str, Any], trained: Trained) -> None:
        state = content["state"]
        tensors: dict[str, Tensor] = {}

        def check() -> Any:
            trained.check(state, read_metadata(path, content["files"]))
            return trained.claims()

        def read() -> None:
            tensors.update(read_tensors(path, read_metadata(path, content["files"]), trained.keys(state)))

        saved_state.check_claims(state, self._ranks.each(check))
        self._ranks.each(read)
        undo = trained.undo()
        try:
            self._ranks.each(lambda: trained.load(state, tensors))
        except BaseException:
            undo()
            raise

    def _write(self, step: int, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        ranks, path, partial = self._ranks, path_of(self.folder, step), partial_of(self.folder, step)
        try:
            ranks.first(lambda: cleared(partial))
            write_tensors(partial, tensors, ranks)
            parts = ranks.each(lambda: summed(own_files(partial, ranks.rank)))
            files = {name: facts for part in parts for name, facts in part.items()}
            ranks.first(lambda: publish(self.folder, step, content, files, self.keep))
        except BaseException as error:
            if ranks.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, (OSError, RuntimeError)):
                kind = OSError if isinstance(error, OSError) else RuntimeError
                raise kind(f"{path} cannot be written: {error}; the saves before it are as they were") from error
            raise

    def _write_behind(self, step: int, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        try:
            self._write(step, content, tensors)
        except BaseException as error:
            self._failed.append(error)


def _tell(failed: list[BaseException]) -> None:
    """Say at the end what nobody has waited for."""
    for error in failed:
        print(f"gpipe: a save begun with wait=False failed: {error}", file=sys.stderr)


def _check_step(step: Any) -> None:
    if type(step) is not int or step < 0:
        raise ValueError(f"step must be a whole number of at least 0, got {step!r}")


def _checked_extra(extra: Any) -> dict[str, Any]:
    """The same as JSON would give it back."""
    given = {} if extra is None else dict(extra)
    try:
        returned: dict[str, Any] = json.loads(json.dumps(given, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"extra must be JSON (text, finite numbers, lists, dicts with text as keys): {error}"
        ) from error
    if returned != given:
        raise TypeError("extra must be JSON, which has no tuples and only text as keys, but holds something else")
    return returned
