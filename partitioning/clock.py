"""Moments on a device: the time on the CPU, and on an accelerator a point in its stream, whose time is known later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from time import perf_counter

import torch

_TRIES = 5  # to read the time of host and device at once: threads of Python may run in between


class Mark:
    """A point in the stream of an accelerator; its event serves again once nobody holds the mark.

    Attributes:
        event: Recorded there.
    """

    __slots__ = ("_idle", "event")

    def __init__(self, event: torch.Event, idle: list[torch.Event]) -> None:
        self.event, self._idle = event, idle

    def __del__(self) -> None:
        self._idle.append(self.event)


Moment = float | Mark
"""Seconds of ``time.perf_counter``, or a mark, of which ``host_seconds`` tells them."""


@cache
def clock(device: torch.device) -> Callable[[], Moment]:
    """What tells the moment on ``device``: the time; or, on an accelerator, a mark in this thread's current stream.

    A mark costs about two microseconds and waits for nothing.
    """
    return _marks(device) if _has_events(device) else perf_counter


def host_seconds(moments: Iterable[Moment]) -> list[float]:
    """The moments as seconds of ``time.perf_counter``, good to some ten microseconds between devices.

    Waits until the devices of the marks have done all that was asked of them.
    """
    now: dict[torch.device, tuple[float, torch.Event]] = {}
    return [moment if isinstance(moment, float) else _seconds_of(moment.event, now) for moment in moments]


def _seconds_of(event: torch.Event, now: dict[torch.device, tuple[float, torch.Event]]) -> float:
    """Counted back from now: the clocks of two devices have nothing in common, and the shorter time is the surer."""
    device = event.device
    if device not in now:
        now[device] = _now(device)
    time, last = now[device]
    return time - event.elapsed_time(last) / 1e3


def _now(device: torch.device) -> tuple[float, torch.Event]:
    """The time and an event of it, on a device that has done its work; of a few the one that took least to record."""
    torch.accelerator.synchronize(device)
    found = []
    for _ in range(_TRIES):
        event = torch.Event(device, enable_timing=True)
        stream = torch.accelerator.current_stream(device)
        before = perf_counter()
        event.record(stream)
        after = perf_counter()
        found.append((after - before, after, event))
    _, time, event = min(found, key=lambda one: one[0])
    event.synchronize()
    return time, event


def _marks(device: torch.device) -> Callable[[], Mark]:
    idle: list[torch.Event] = []

    def mark() -> Mark:
        try:
            event = idle.pop()
        except IndexError:
            event = torch.Event(device, enable_timing=True)
        event.record(torch.accelerator.current_stream(device))
        return Mark(event, idle)

    return mark


def _has_events(device: torch.device) -> bool:
    """Whether it is an accelerator whose events tell the time."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device.type:
        return False
    try:
        first, second = (torch.Event(device, enable_timing=True) for _ in range(2))
        for event in (first, second):
            event.record(torch.accelerator.current_stream(device))
        second.synchronize()
        first.elapsed_time(second)
    except (NotImplementedError, RuntimeError):
        return False
    return True
