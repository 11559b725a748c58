"""The loop that performs a worker's actions, and the threads that run it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from queue import SimpleQueue
from traceback import walk_tb
from types import GeneratorType
from typing import Any

import torch

from gpipe.boundary import Boundary
from gpipe.context import CallerContext, autocast_off
from gpipe.metering import Meters
from gpipe.partitioning.clock import Moment, clock
from gpipe.recording import Noted
from gpipe.schedule import Action, Kind
from gpipe.stage import Flight
from gpipe.transport import CALLER, Aborted, Direction, Transport
from gpipe.ways import Ways

Neighbour = tuple[int, Direction]  # a stage or the caller, and how it is talked to


@dataclass(frozen=True)
class Work:
    """What the workers share while they perform one half, or all, of a mini-batch's schedule.

    Attributes:
        flights: The mini-batch's record on every stage they host, by the stage's index.
        stages: How many stages the whole pipeline has.
        transport: Connects the stages.
        forward_modes: The caller's autocast for forward and recompute.
        backward_modes: The caller's autocast for backward.
        meters: Count what the stages hold.
        repeats: Forwards repeat those of a first pass; they are recorded as the recomputes they are.
        window: By how many micro-batches a stage may be ahead of the next, where there are forwards alone, from the
            first micro-batch to the last; None for any number.
    """

    flights: Mapping[int, Flight]
    stages: int
    transport: Transport
    forward_modes: CallerContext
    backward_modes: CallerContext
    meters: Meters | None = None
    repeats: bool = False
    window: int | None = None

    def shown(self, action: Action) -> Action:
        """The action as timelines and messages name it."""
        return action._replace(kind=Kind.RECOMPUTE) if self.repeats and action.kind == Kind.FORWARD else action

    @cached_property
    def neighbours(self) -> dict[tuple[int, Kind], tuple[list[Neighbour], list[Neighbour]]]:
        """By stage and kind of action: where messages come from, and where they go."""
        return {
            (k, kind): neighbours(k, kind, self.stages, f.stage.ways) for k, f in self.flights.items() for kind in Kind
        }

    @cached_property
    def clocks(self) -> dict[int, Callable[[], Moment]]:
        """By stage: what tells the moment on its device."""
        return {k: clock(flight.stage.device) for k, flight in self.flights.items()}

    def counting(self, stage: int) -> AbstractContextManager[Any]:
        """Count what operators make inside on the account of ``stage``."""
        return _NOTHING if self.meters is None else self.meters.counting(stage)


def neighbours(stage: int, kind: Kind, stages: int, ways: Ways) -> tuple[list[Neighbour], list[Neighbour]]:
    """Where an action's messages come from, and where they go: first the chain's, then those that skip stages.

    Args:
        stage: Whose action it is.
        kind: What it does.
        stages: How many the pipeline has.
        ways: The skip connections of the stage.
    """
    before = stage - 1 if stage else CALLER
    after = stage + 1 if stage + 1 < stages else CALLER
    if kind == Kind.FORWARD:
        return (
            [(before, Direction.FORWARD), *((s, Direction.SKIP_FORWARD) for s in ways.sources)],
            [(after, Direction.FORWARD), *((t, Direction.SKIP_FORWARD) for t in ways.targets)],
        )
    if kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
        return (
            [(after, Direction.BACKWARD), *((t, Direction.SKIP_BACKWARD) for t in ways.targets)],
            [(before, Direction.BACKWARD), *((s, Direction.SKIP_BACKWARD) for s in ways.sources)],
        )
    return [], []


_NOTHING = nullcontext()
_LATE = ", or in what was launched before: accelerators tell late (at once with CUDA_LAUNCH_BLOCKING=1)"


def perform(work: Work, actions: Sequence[Action], spans: list[Noted]) -> None:
    """Perform ``actions`` one after the other: receive, compute, send.

    Args:
        work: Stages and transport.
        actions: What this worker does, in order.
        spans: Where the time of every action's computation is recorded.

    Raises:
        BaseException: Whatever a cell raised, with a note that says where.
    """
    for action in actions:
        try:
            _act(work, action, spans)
        except Aborted:
            raise
        except BaseException as error:
            _leave_checkpoints(error)
            flight = work.flights[action.stage]
            cell = f", cell {flight.cell}" if flight.cell else ""
            shown = work.shown(action)
            where = f"{flight.stage}{cell}, micro-batch {action.micro_batch}, action {shown}"
            error.add_note(f"gpipe: raised in {where}{_LATE if isinstance(error, torch.AcceleratorError) else ''}")
            raise


def _leave_checkpoints(error: BaseException) -> None:
    """Make this thread leave what ``torch.utils.checkpoint`` entered on the way to ``error``.

    Before torch 2.14 its hooks on saved tensors stay on the thread that the error came from until that is forgotten: a
    worker's next micro-batch would save through them, and torch fails where another thread forgets the error.
    """
    errors = [error]
    for known in errors:
        others = (known.__cause__, known.__context__)
        errors += [other for other in others if other is not None and all(other is not e for e in errors)]
    frames = [frame for known in errors for frame, _ in walk_tb(known.__traceback__)]
    for frame in reversed(frames):  # the innermost first
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            for value in frame.f_locals.values():
                if isinstance(value, GeneratorType):
                    value.close()


def _act(work: Work, action: Action, spans: list[Noted]) -> None:
    k, kind, m = action
    sources, targets = work.neighbours[k, kind]
    if work.window is not None and m >= work.window and targets[0][0] != CALLER:
        work.transport.receive(targets[0][0], k, Direction.BACKWARD, m - work.window)
    messages = [work.transport.receive(source, k, direction, m) for source, direction in sources]
    if work.window is not None and sources[0][0] != CALLER:
        work.transport.send(k, sources[0][0], Direction.BACKWARD, m, [])  # taken
    modes = work.forward_modes if kind in (Kind.FORWARD, Kind.RECOMPUTE) else work.backward_modes
    now = work.clocks[k]
    start = now()
    try:
        with modes.autocasting(), work.counting(k):
            results = _COMPUTE[kind](work.flights[k], m, messages)
    except RuntimeError as error:
        _note_other_devices(error, work, k, sources, messages)
        raise
    spans.append(Noted(work.shown(action), start, now()))
    for (target, direction), result in zip(targets, results or (), strict=True):
        work.transport.send(k, target, direction, m, result)


def _note_other_devices(
    error: RuntimeError, work: Work, stage: int, sources: Sequence[Neighbour], messages: Sequence[Any]
) -> None:
    """Name who sent a stage tensors of another device, where it failed for that: its own cells are innocent."""
    here = work.flights[stage].stage.device
    for (source, _), message in zip(sources, messages, strict=True):
        if "same device" not in str(error) or not isinstance(message, Boundary) or source == CALLER:
            continue
        elsewhere = {leaf.device for leaf in message.leaves if isinstance(leaf, torch.Tensor)} - {here}
        if elsewhere:
            named = f"{work.flights[source].stage}" if source in work.flights else f"stage {source}"
            error.add_note(
                f"gpipe: its input has tensors on {', '.join(sorted(map(str, elsewhere)))}, not on {here}: {named} "
                "returned them on another device than its own, where they stay; let its cells make them with "
                "device=x.device"
            )


_COMPUTE: dict[Kind, Callable[[Flight, int, Any], Any]] = {
    Kind.FORWARD: Flight.forward,
    Kind.RECOMPUTE: lambda flight, m, _: flight.recompute(m),
    Kind.BACKWARD: Flight.backward,
    Kind.INPUT_GRADIENT: Flight.input_gradient,
    Kind.WEIGHT_GRADIENT: lambda flight, m, _: flight.weight_gradient(m),
}


def workers_for(stages: int, intra_op_threads: int) -> Workers | CallersThread:
    """What performs the actions of so many stages."""
    return CallersThread(intra_op_threads) if stages == 1 else Workers(stages, intra_op_threads)


_Jobs = SimpleQueue[Callable[[], None] | None]


class Workers:
    """Threads that live as long as the pipe, one a worker: fresh threads would get fresh allocator arenas every step.

    Args:
        count: Number of threads.
        intra_op_threads: Threads each may use inside an operator on the CPU.
    """

    def __init__(self, count: int, intra_op_threads: int) -> None:
        self._process = os.getpid()
        self._jobs: list[_Jobs] = [SimpleQueue() for _ in range(count)]
        self._threads = [
            threading.Thread(target=_serve, args=(jobs, intra_op_threads), name=f"gpipe-worker-{w}", daemon=True)
            for w, jobs in enumerate(self._jobs)
        ]
        callers = torch.get_num_threads()
        for thread in self._threads:
            thread.start()
        self._stop = weakref.finalize(self, _stop, self._process, self._jobs, self._threads)
        self.run([lambda: None] * count)  # now every thread has set its own
        torch.set_num_threads(callers)  # a worker's setting is also the default for threads that start later

    def usable(self) -> bool:
        """Whether the threads exist in this process (they do not in a fork of it)."""
        return self._process == os.getpid()

    def inside(self) -> bool:
        """Whether one of the threads is asking."""
        return threading.current_thread() in self._threads

    def run(self, jobs: Sequence[Callable[[], None]], abort: Callable[[], None] = lambda: None) -> None:
        """Run one job on every worker and wait for all of them.

        Args:
            jobs: One a worker, for the first so many.
            abort: Called when a job raises or the waiting caller is interrupted; must make the others end soon.

        Raises:
            BaseException: What the first failing job raised, or what interrupted the caller, once all jobs have ended.
            RuntimeError: The threads are those of another process, which this one was forked from.
        """
        if not self.usable():
            raise RuntimeError(
                "this process was forked after the mini-batch went forward, and its workers stayed in the other: "
                "run forward and backward in the same process"
            )
        done: SimpleQueue[None] = SimpleQueue()
        runs = [_Once(job, done, abort) for job in jobs]
        waiting = list(zip(self._jobs[: len(runs)], runs, strict=True))
        interrupt: BaseException | None = None
        while waiting or not all(run.ended for run in runs):
            try:
                if waiting:
                    waiting[-1][0].put(waiting[-1][1])
                    waiting.pop()
                else:
                    done.get()
            except BaseException as error:  # Ctrl-C: the workers end first, then the caller hears of it
                interrupt = error
                abort()
        failure = interrupt or next((e for e in (run.error for run in runs) if e is not None), None)
        for run in runs:
            run.error = None  # its traceback holds the run: keep no cycle
        del runs, waiting
        if failure is not None:
            try:
                raise failure
            finally:
                del failure, interrupt  # the traceback holds this frame: keep no cycle


class CallersThread:
    """What a single worker is: the caller itself. Nothing is handed over, and debuggers and profilers see the cells.

    Args:
        intra_op_threads: As a worker of ``Workers`` would have.
    """

    def __init__(self, intra_op_threads: int) -> None:
        self._intra_op_threads = intra_op_threads

    def usable(self) -> bool:
        """Always: the caller is there."""
        return True

    def inside(self) -> bool:
        """Never: the caller waits for no other thread."""
        return False

    def run(self, jobs: Sequence[Callable[[], None]], abort: Callable[[], None] = lambda: None) -> None:
        """Run the job, without the caller's autocast, which jobs set themselves; what it raises is raised."""
        callers = torch.get_num_threads()
        torch.set_num_threads(self._intra_op_threads)
        try:
            with autocast_off():
                for job in jobs:
                    job()
        finally:
            torch.set_num_threads(callers)


class _Once:
    """A job that runs once even if an interrupted caller hands it over twice, and keeps what it raised."""

    def __init__(self, job: Callable[[], None], done: SimpleQueue[None], abort: Callable[[], None]) -> None:
        self._job: Callable[[], None] | None = job
        self._done = done
        self._abort = abort
        self.ended = False
        self.error: BaseException | None = None

    def __call__(self) -> None:
        job, self._job = self._job, None
        if job is None:
            return
        try:
            job()
        except Aborted:
            pass
        except BaseException as error:
            self.error = error
            self._abort()
        del job  # before the caller goes on: what it holds is the caller's to free
        self.ended = True
        self._done.put(None)


def _serve(jobs: _Jobs, intra_op_threads: int) -> None:
    torch.get_num_threads()  # otherwise the first operator would set this thread's number to the process's
    torch.set_num_threads(intra_op_threads)
    while (job := jobs.get()) is not None:
        job()
        del job


def _stop(process: int, jobs: list[_Jobs], threads: list[threading.Thread]) -> None:
    if process != os.getpid():
        return
    for queue in jobs:
        queue.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
