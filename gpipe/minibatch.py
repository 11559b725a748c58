"""One mini-batch in flight: its record on every stage, and the two halves of its schedule."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gpipe.batchnorm import Statistics, commit
from gpipe.boundary import Boundary, Gradients
from gpipe.context import CallerContext
from gpipe.found import Found
from gpipe.gradients import collected
from gpipe.metering import Meters
from gpipe.recording import Noted, Recording
from gpipe.schedule import Action, Schedule
from gpipe.stage import Flight, Head, Stage
from gpipe.tied import Replicas, Tied, added
from gpipe.transport import CALLER, Direction, Drain, Supply, ThreadTransport
from gpipe.two_pass import passes, window
from gpipe.worker import CallersThread, Work, Workers, perform

Actions = Sequence[Sequence[Action]]


@dataclass(frozen=True)
class Pipeline:
    """What all mini-batches of a pipe share.

    Attributes:
        stages: The stages.
        workers: What performs their actions.
        lock: Held while they do: gradients, and what stages learn, are for one thread of the user at a time.
        parameters: The trainable parameters.
        tied: Those that several cells use.
    """

    stages: Sequence[Stage]
    workers: Workers | CallersThread
    lock: AbstractContextManager[Any]
    parameters: Sequence[Tensor]
    tied: Sequence[Tied] = ()


class MiniBatch:
    """One mini-batch on its way forward and back.

    Args:
        pipeline: Stages and workers.
        schedule: What the workers do.
        seed: The pipe's base seed.
        step: The training step, which random draws depend on.
        defer_batch_norm: Collect batch-norm statistics and commit them after forward.
        head: Computes each micro-batch's loss on the last stage, for schedules that interleave forward and backward.
        metered: Count what the stages hold.
        two_pass: ``forward`` is the first pass, ``backward`` the second, whose schedule is given.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        *,
        seed: int,
        step: int,
        defer_batch_norm: bool = False,
        head: Head | None = None,
        metered: bool = False,
        two_pass: bool = False,
    ) -> None:
        self._pipeline = pipeline
        self._schedule = schedule
        self._two_pass = two_pass
        self._supply: Supply | None = None
        self._context = CallerContext.capture([s.device for s in pipeline.stages])
        self._statistics: Statistics | None = {} if defer_batch_norm else None
        last = len(pipeline.stages) - 1
        self._flights = [
            Flight(
                stage=stage,
                seed=seed,
                step=step,
                recomputed=frozenset(m for k, m in schedule.recomputed if k == stage.index),
                statistics=self._statistics,
                head=head if stage.index == last else None,
                two_pass=two_pass,
            )
            for stage in pipeline.stages
        ]
        held = {stage.index: stage.parameter_bytes for stage in pipeline.stages} if metered else {}
        self.recording = Recording([[] for _ in schedule.workers], Meters(held, last + 1) if metered else None)
        self._replicas = Replicas(pipeline.tied, [stage.device for stage in pipeline.stages])
        self._found: Found | None = None
        self._spent = False
        self.output_gradients: list[Gradients] = []

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The trainable parameters whose gradients a backward gives."""
        return self._pipeline.parameters

    def forward(self, inputs: Sequence[Boundary]) -> list[Boundary]:
        """Run the forward half on every micro-batch's input; gives every micro-batch's output."""
        if self._schedule.recomputed or self._two_pass:
            self._found = Found([m for flight in self._flights for m in flight.modules])
        forward, _ = self._halves
        transport = self._transport()
        if self._two_pass:
            self._supply = Supply(inputs, self.recording.meters)
            transport.connect(CALLER, 0, Direction.FORWARD, self._supply)
        else:
            self._enter(inputs, transport)
        ahead = window(self._schedule) if self._two_pass else None
        self._perform(forward, transport, self._context, window=ahead)
        self._commit()
        return [transport.receive(self._last, CALLER, Direction.FORWARD, m) for m in range(len(inputs))]

    def backward(self, keep_graph: bool) -> tuple[list[Gradients], list[Tensor | None]]:
        """Run the rest of the schedule, or the second pass, on ``output_gradients``.

        Args:
            keep_graph: Another backward of this mini-batch may follow.

        Returns:
            For every micro-batch its input's gradients leaf by leaf; for every parameter the mini-batch's gradient.

        Raises:
            RuntimeError: The mini-batch has gone backward before, or a parameter changed since forward.
        """
        with self._pipeline.lock:
            return self._backward(keep_graph)

    def _backward(self, keep_graph: bool) -> tuple[list[Gradients], list[Tensor | None]]:
        if self._spent:
            raise RuntimeError(
                "this mini-batch has gone backward already and its activations are freed: "
                "pass retain_graph=True to the first backward, or run the pipe forward again"
            )
        self._refuse_engine_thread()
        if self._found is not None:
            self._found.check()
        self._spent = not keep_graph
        for flight in self._flights:
            flight.keep_graph = keep_graph
        _, backward = self._halves
        transport = self._transport()
        if self._supply is not None:
            transport.connect(CALLER, 0, Direction.FORWARD, self._supply)
            transport.connect(self._last, CALLER, Direction.FORWARD, Drain())
        gradients, self.output_gradients = self.output_gradients, []
        for m, by_leaf in enumerate(gradients):
            transport.send(CALLER, self._last, Direction.BACKWARD, m, by_leaf)
        count = len(gradients)
        del gradients, by_leaf
        with collected(self.parameters) as totals, self._found.restored() if self._found else nullcontext():
            modes = CallerContext.capture([s.device for s in self._pipeline.stages])
            self._perform(backward, transport, modes, repeats=self._two_pass)
            with self._context.on_streams():
                self._replicas.add_up()
        arrived = [transport.receive(0, CALLER, Direction.BACKWARD, m) for m in range(count)]
        self._context.rejoin([*totals, *chain.from_iterable(arrived)])
        return arrived, totals

    def forward_and_backward(self, inputs: Sequence[Boundary], scale: Tensor) -> tuple[Boundary, Finished]:
        """Run the whole schedule; gives the sum of what the last stage's ``head`` made of every micro-batch.

        Args:
            inputs: Of every micro-batch.
            scale: What the losses' gradient begins with.
        """
        self._spent = True
        transport = self._transport()
        self._enter(inputs, transport)
        for m in range(len(inputs)):
            transport.send(CALLER, self._last, Direction.BACKWARD, m, [scale])
        with collected(self.parameters) as totals:
            self._perform(self._schedule.workers, transport, self._context.without_autocast())
            self._replicas.add_up()
        self._commit()
        count = range(len(inputs))
        shares = [transport.receive(self._last, CALLER, Direction.FORWARD, m) for m in count]
        arrived = [transport.receive(0, CALLER, Direction.BACKWARD, m) for m in count]
        return _sum(shares), Finished(self.parameters, arrived, totals)

    def _refuse_engine_thread(self) -> None:
        """Raise a RuntimeError in a thread of autograd's, whose device the workers' backward would wait for."""
        threaded = isinstance(self._pipeline.workers, Workers)
        foreign = isinstance(threading.current_thread(), threading._DummyThread)  # autograd's, or the user's own
        if not (threaded and foreign and torch._C._current_graph_task_id() != -1):
            return
        if any(flight.stage.device.type != "cpu" for flight in self._flights):
            raise RuntimeError(
                "the backward of a pipe on accelerators began inside another backward, in a thread of autograd's "
                "(torch.utils.checkpoint with use_reentrant=True, or a Function or hook that calls backward()), and "
                "would wait for itself: give use_reentrant=False, or call backward() outside"
            )

    @property
    def _last(self) -> int:
        return len(self._flights) - 1

    def _enter(self, inputs: Sequence[Boundary], transport: ThreadTransport) -> None:
        """Send the inputs, copied: neither do cells write to the caller's tensors, nor the caller to a recompute's."""
        for m, boundary in enumerate(inputs):
            transport.send(CALLER, 0, Direction.FORWARD, m, boundary.copy())

    @property
    def _halves(self) -> tuple[Actions, Actions]:
        """What workers do before the caller's loss, and after."""
        return passes(self._schedule) if self._two_pass else self._schedule.halves

    def _transport(self) -> ThreadTransport:
        stages = self._pipeline.stages
        skips = [(stage.index, target) for stage in stages for target in stage.ways.targets]
        return ThreadTransport([stage.device for stage in stages], skips, self.recording.meters)

    def _perform(
        self, actions: Actions, transport: ThreadTransport, backward_modes: CallerContext, **options: Any
    ) -> None:
        flights, meters = dict(enumerate(self._flights)), self.recording.meters
        work = Work(flights, len(flights), transport, self._context, backward_modes, meters, **options)
        jobs = [self._job(work, *worker) for worker in zip(actions, self.recording.spans, strict=True) if worker[0]]
        self._pipeline.workers.run(jobs, transport.abort)

    def _job(self, work: Work, actions: Sequence[Action], spans: list[Noted]) -> Callable[[], None]:
        """What one worker does: its actions, in the caller's context."""
        hosted = [self._flights[k].stage for k in sorted({a.stage for a in actions})]

        def run() -> None:
            with self._context.applied(hosted[0].device), ExitStack() as guards:
                guards.enter_context(self._replicas.in_place([stage.index for stage in hosted]))
                for stage in hosted:
                    guards.enter_context(stage.draws.guard(str(stage)))
                perform(work, actions, spans)

        return partial(self._context.variables.copy().run, run)

    def _commit(self) -> None:
        if self._statistics:
            commit(self._statistics)
            self._statistics.clear()


@dataclass
class Finished:
    """A mini-batch that has gone forward and backward, its gradients waiting to be handed to autograd."""

    parameters: Sequence[Tensor]
    arrived: list[Gradients]
    totals: list[Tensor | None]
    output_gradients: list[Gradients] = field(default_factory=list)

    def and_also(self, parameters: Sequence[Tensor], totals: Sequence[Tensor | None]) -> None:
        """Take in gradients computed elsewhere, added where there are some already."""
        own = dict(zip(self.parameters, self.totals, strict=True))
        for p, total in zip(parameters, totals, strict=True):
            own[p] = added([own.get(p), total], p.device)
        self.parameters, self.totals = list(own), list(own.values())

    def backward(self, keep_graph: bool) -> tuple[list[Gradients], list[Tensor | None]]:
        """Give what the workers computed, once."""
        arrived, totals = self.arrived, self.totals
        self.arrived, self.totals = [], []
        return arrived, totals


def _sum(shares: Sequence[Boundary]) -> Boundary:
    """The mini-batch's loss from its micro-batches' shares, in their order."""
    loss = torch.stack([share.leaves[0] for share in shares]).sum()
    return replace(shares[0], leaves=(loss,), needs_grad=(any(share.needs_grad[0] for share in shares),))
