"""The output folder of a run: what stands where, and who may write to it."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpipe.saving.whole_files import sweep
from gpipe.training.config import Configuration
from gpipe.training.data import Data
from gpipe.training.data_digest import digest
from gpipe.training.errors import ConfigurationError
from gpipe.training.problems import shown
from gpipe.training.reading import dump, read_configuration
from gpipe.training.saving import write_text

# The bits do not depend on these, so a run may go on with others.
FREE_KEYS = frozenset(
    {"output", "training.save_every"} | {f"pipeline.{key}" for key in ("stages", "balance", "devices", "checkpoint")}
)
FREE_SECTIONS = ("logging.",)

_LOCK = ".lock"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems without
_JOB = "# Trained by the torchrun job "


class RunFolder:
    """Names of the files in an output folder, and a lock that keeps two runs from writing to it at once.

    The operating system lets go of the lock when the process that holds it ends, however it ends.

    Attributes:
        path: The folder itself, which holds TensorBoard's files too.
        configuration: ``config.yaml``, every default written out.
        data: ``data.txt``, what tells whether the training data are still the same.
        saves: The folder of the saves.
        weights: ``weights.safetensors``, written at the end.
        scores: ``eval.json``, written by ``gpipe eval``. When a run that had ended goes on to more steps, both are
            kept under the number of steps they are of, such as ``weights-step-000001000.safetensors``.
        timeline: ``timeline.json``, who was busy when in the last step; https://ui.perfetto.dev opens it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configuration = path / "config.yaml"
        self.data = path / "data.txt"
        self.saves = path / "saves"
        self.weights = path / "weights.safetensors"
        self.scores = path / "eval.json"
        self.timeline = path / "timeline.json"
        self._lock = FileLock(path / _LOCK)
        self._claimed = False
        self._before: Configuration | None = None
        self._digest: str | None = None

    def check(
        self, configuration: Configuration, source: object, resume: bool, restarted: str | None = None
    ) -> Configuration | None:
        """Make sure that a run may write here; returns the configuration of the run to resume, if there is one.

        Nobody else may then write here until `release`, which is to be called after a refusal too.

        Args:
            configuration: Of the run that would write.
            source: Where that is from, for messages.
            resume: Whether the user asked to go on with the run that is here.
            restarted: The job that started this process again: it goes on with a run of its own unasked.

        Raises:
            ConfigurationError: If something else is here, or a run that this configuration cannot continue.
        """
        self._holds_a_run(source)  # what is somebody else's is refused before a lock is put there
        self._take(source)
        if not self._holds_a_run(source):
            return None
        if not resume and (restarted is None or self._job() != restarted):
            remedy = "continue it with --resume, or choose another folder: --set output=FOLDER"
            raise ConfigurationError(source, [f"output: {self.path} holds a run already; {remedy}"])
        before = read_configuration(self.configuration)
        if problems := list(_differences(before, configuration)):
            raise ConfigurationError(
                f"{source}: cannot resume {self.path}, which was trained otherwise (set these back, or start a new run "
                "with --set output=FOLDER)",
                problems,
            )
        self._before = before
        return before

    def _holds_a_run(self, source: object) -> bool:
        try:
            used = self.path.exists() and (not self.path.is_dir() or any(map(_counts, self.path.iterdir())))
        except OSError as error:
            raise ConfigurationError(source, [f"output: {self.path} cannot be read: {error}"]) from error
        if used and not self.configuration.is_file():
            raise ConfigurationError(
                source, [f"output: {self.path} is in use, but not by gpipe; choose another: --set output=FOLDER"]
            )
        return used

    def _take(self, source: object) -> None:
        """Create the folder if need be, and lock it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
        except Timeout as error:
            remedy = "wait for it to end, or choose another folder: --set output=FOLDER"
            raise ConfigurationError(
                source, [f"output: {self.path} is being written by another gpipe train: {remedy}"]
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                message = f"output: {self.path} cannot be created or locked: {error}"
                raise ConfigurationError(source, [message]) from error
            warnings.warn(f"{self.path} cannot be locked ({error}): see that no other run writes there", stacklevel=2)

    def release(self) -> None:
        """Let others write here, if this process kept them from it."""
        self._lock.release()

    def check_data(self, data: Data, source: object) -> None:
        """Make sure that the data are those of the run that is here, if one is.

        Raises:
            ConfigurationError: If the training part has changed: what is held out may then have been trained on.
        """
        self._digest = digest(data)
        if not self.data.is_file():
            return
        then = self.data.read_text(encoding="utf-8", errors="replace").strip()
        if then != self._digest:
            problem = f"data: are not those that {self.path} was trained on ({then}; now {self._digest})"
            remedy = "restore them, or start a new run with --set output=FOLDER"
            raise ConfigurationError(
                source, [f"{problem}, and what is held out now may have been trained on: {remedy}"]
            )

    def claim(self, configuration: Configuration, source: object, job: str | None = None) -> None:
        """Copy the configuration in, and what `check_data` found, once: the folder belongs to the run from here on.

        Args:
            configuration: Of the run.
            source: Where it is from.
            job: The job that trains, if it may be started again.
        """
        if self._claimed:
            return
        assert self._digest is not None, "check_data comes first"
        self._claimed = True
        for path in (self.configuration, self.data, self.weights, self.timeline):
            sweep(path)
        if self._before is not None and self._before.training.steps < configuration.training.steps:
            self._set_aside(self._before.training.steps)
        head = f"# What {source} and --set said, with every default.\n"
        if job is not None:
            head += f"{_JOB}{job}\n"
        write_text(self.configuration, f"{head}{dump(configuration)}")
        write_text(self.data, f"{self._digest}\n")

    def _set_aside(self, steps: int) -> None:
        """Rename what is of a run that had ended after ``steps``, so that it is not taken for the longer one's."""
        for path in (self.weights, self.scores):
            with suppress(FileNotFoundError):
                path.replace(path.with_stem(f"{path.stem}-step-{steps:09d}"))

    def _job(self) -> str | None:
        """The job that claimed the folder last, if it may be started again."""
        with self.configuration.open(encoding="utf-8") as file:
            head = [line.rstrip("\n") for line in islice(file, 2)]
        return head[-1].removeprefix(_JOB) if head and head[-1].startswith(_JOB) else None


def _counts(path: Path) -> bool:
    """Whether a file in the folder is somebody's: not a lock, nor what a killed process left half written."""
    return path.name != _LOCK and not (path.name.startswith(".") and path.name.endswith(".partial"))


def _differences(before: Configuration, now: Configuration) -> Iterator[str]:
    """A line for each key that would change the bits."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in dict.fromkeys([*old, *new]):
        if key in FREE_KEYS or key.startswith(FREE_SECTIONS) or old.get(key) == new.get(key):
            continue
        if key == "training.steps":
            if new[key] < old[key]:
                yield f"{key}: may grow but not shrink: {old[key]} in the run, {new[key]} now"
            continue
        yield f"{key}: {shown(old.get(key))} in the run, {shown(new.get(key))} now"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
