"""What a run shows on the way: a progress bar or plain lines, and scalars for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from gpipe.timeline import Timeline
from gpipe.training.errors import RunError
from gpipe.training.trainer import StepResult

_MEBIBYTE = 2**20


class Logs:
    """Tells of a run's steps; a context, within which the bar is drawn and TensorBoard's file is open.

    Args:
        folder: Where TensorBoard's files go.
        console: Where bar and lines go.
        steps: All steps of the run.
        start: Steps done before; what TensorBoard has of later ones is from a run that was cut off, and is hidden.
        every: Steps between two points or lines.
        batch_size: Rows of a step.
        shown: Whether this process shows anything: where there are several, one does.
    """

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        steps: int,
        start: int,
        every: int,
        batch_size: int,
        shown: bool = True,
    ) -> None:
        self._console = console
        self._shown = shown
        self._steps, self._every, self._batch_size = steps, every, batch_size
        self._folder = folder
        self._writer: SummaryWriter | None = None
        self._began, self._start = time.monotonic(), start
        self._last_time, self._last_step = self._began, start
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}  {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=steps, completed=start, loss="", speed="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is None:
            return
        with self._writing() if error is None else suppress(OSError):
            self._writer.close()

    def flush(self) -> None:
        """Have the disk hold all points so far."""
        with self._writing():
            if self._writer is not None:
                self._writer.flush()

    def due(self, step: int) -> bool:
        """Whether a point or line is due after so many steps."""
        return step % self._every == 0 or step == self._steps

    def step(self, step: int, loss: float) -> None:
        """Move the bar on, after so many steps."""
        self._progress.update(self._task, completed=step, loss=f"loss {loss:.4f}")

    def point(self, step: int, result: StepResult, busy: Sequence[float], peaks: Mapping[str, int]) -> None:
        """Tell of a step that is due.

        Args:
            step: Steps done, this one included.
            result: What it gave.
            busy: Each stage's share of the time it spent computing.
            peaks: The most bytes held so far, by where.
        """
        now = time.monotonic()
        speed = (step - self._last_step) * self._batch_size / max(now - self._last_time, 1e-9)
        self._last_time, self._last_step = now, step
        if not self._shown:
            return
        self._write(step, result, speed, busy, peaks)
        self._progress.update(self._task, speed=f"{speed:.0f} samples/s")
        if not self._console.is_terminal:
            tell(self._console, self._line(step, result, speed))

    def timeline(self, step: int, timeline: Timeline) -> None:
        """Keep who was busy when in a step: as a picture in TensorBoard, and as a trace in the folder.

        Args:
            step: Steps done, this one included.
            timeline: Of this step.
        """
        if not self._shown:
            return
        with self._writing():
            timeline.to_chrome_trace(self._folder / "timeline.json")
            self._to_tensorboard().add_figure("timeline", timeline.figure(title=f"step {step}"), step)

    def _write(
        self, step: int, result: StepResult, speed: float, busy: Sequence[float], peaks: Mapping[str, int]
    ) -> None:
        scalars = {"loss": result.loss, "learning_rate": result.learning_rate, "samples_per_second": speed}
        scalars |= {f"busy/stage_{stage}": share for stage, share in enumerate(busy)}
        scalars |= {f"peak_memory_mebibytes/{place}": size / _MEBIBYTE for place, size in peaks.items()}
        with self._writing():
            for name, value in scalars.items():
                self._to_tensorboard().add_scalar(name, value, step)

    def _to_tensorboard(self) -> SummaryWriter:
        """Opened when there is something to write: a failed first step leaves no file."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=self._start + 1, flush_secs=10)
        return self._writer

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"TensorBoard's file in {self._folder} cannot be written: {error}") from error

    def _line(self, step: int, result: StepResult, speed: float) -> str:
        pace = (time.monotonic() - self._began) / max(1, step - self._start)
        left = timedelta(seconds=round((self._steps - step) * pace))
        return (
            f"step {step}/{self._steps}  loss {result.loss:.4f}  learning rate {result.learning_rate:.3g}  "
            f"{speed:.0f} samples/s  {left} left"
        )


def tell(console: Console, message: str) -> None:
    """Print a line as it is: no markup, no colours for numbers, no line breaks of our own."""
    console.print(message, markup=False, highlight=False, soft_wrap=True)
