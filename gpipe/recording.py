"""What a mini-batch of a running pipe did, and when, and what it held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from gpipe.actions import Action
from gpipe.metering import Meters
from gpipe.partitioning.clock import Moment, host_seconds
from gpipe.timeline import Memory, Span, Timeline


class Noted(NamedTuple):
    """A span as its worker noted it: on an accelerator the moments are marks, whose times are read when asked for."""

    action: Action
    start: Moment
    end: Moment


@dataclass(frozen=True)
class Recording:
    """Filled by the workers of one mini-batch.

    Attributes:
        spans: Per worker, in order.
        meters: What the stages hold, if that is counted.
    """

    spans: Sequence[list[Noted]] = ()
    meters: Meters | None = field(default=None)

    def timeline(self) -> Timeline:
        """What has been recorded so far; waits until accelerators have done it."""
        memory = [] if self.meters is None else [Memory(*levels) for levels in self.meters.levels()]
        return Timeline(self._settled(), memory=tuple(memory))

    def _settled(self) -> tuple[list[Span], ...]:
        """The spans with the times of their marks, which take the marks' place."""
        noted = [list(spans) for spans in self.spans]  # workers may add more meanwhile
        times = iter(host_seconds([moment for spans in noted for _, *moments in spans for moment in moments]))
        settled = tuple([Span(action, next(times), next(times)) for action, *_ in spans] for spans in noted)
        for spans, known in zip(self.spans, settled, strict=True):
            spans[: len(known)] = [Noted(*span) for span in known]
        return settled


class Recordable(Protocol):
    """A ``GPipe``, or a ``DistributedGPipe``, of which a rank's own stages are recorded.

    Attributes:
        recording: Of the latest mini-batch.
        metered: Count what the stages hold in the next.
    """

    recording: Recording
    metered: bool

    @property
    def devices(self) -> Sequence[torch.device]:
        """Of every stage, or every stage of this rank."""


@contextmanager
def record(pipe: Recordable, *, memory: bool = False) -> Iterator[Timeline]:
    """Record what runs inside; afterwards the timeline that was given holds the last mini-batch.

    At the end it waits until accelerators have done that mini-batch, for the times are theirs.

    Args:
        pipe: The pipe. Of a ``DistributedGPipe`` the rank's own stages are recorded; ``timeline.memory`` is empty at
            the others' places.
        memory: Also record the bytes of every stage: its parameters, all that its operators make, gradients included,
            and all that it receives, as if each stage had a device of its own. That takes time for every operator, and
            copies of what stages send each other: record seconds without. The model's outputs, put together, belong to
            the last stage; what the loss makes belongs to none.

    Raises:
        ValueError: Memory is asked for of stages that are not on the CPU.
    """
    if memory and any(device.type != "cpu" for device in pipe.devices):
        raise ValueError(
            f"memory=True counts storages on the CPU, but the stages are on {', '.join(map(str, pipe.devices))}: take "
            "torch.accelerator.max_memory_allocated(device) there"
        )
    timeline = Timeline(())
    before, pipe.metered = pipe.recording, memory
    try:
        yield timeline
    finally:
        pipe.metered = False
        if pipe.recording is not before:
            vars(timeline).clear()
            vars(timeline).update(vars(pipe.recording.timeline()))
