"""One mini-batch on one rank: the record on its own stages, and its share of the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from gpipe.autograd import attach
from gpipe.batchnorm import Statistics
from gpipe.boundary import Boundary, Gradients, new_anchor
from gpipe.context import CallerContext, autocast_off
from gpipe.found import Found
from gpipe.gradients import collected
from gpipe.metering import Meters
from gpipe.microbatch import gather
from gpipe.minibatch import Finished
from gpipe.ranks.group_transport import GroupTransport
from gpipe.ranks.message_order import Passing, message_order
from gpipe.ranks.share import Share
from gpipe.recording import Recording
from gpipe.schedule import Action, Kind, Schedule
from gpipe.stage import Flight, Head
from gpipe.tied import Replicas, added
from gpipe.transport import CALLER, Direction, Drain, Supply
from gpipe.two_pass import passes, window
from gpipe.ways import Ways
from gpipe.worker import Work, perform

Part = Literal["before", "after", "all"]  # of a schedule: the loss over the mini-batch stands between the first two


class RankBatch:
    """One mini-batch on its way through the stages of this rank.

    Args:
        share: The rank's stages.
        schedule: What all ranks do.
        transport: Connects them.
        seed: The pipe's base seed.
        step: The training step, which random draws depend on.
        first: What else they depend on: the number of the first micro-batch among those of all replicas.
        head: Computes each micro-batch's loss, for the last stage, where the workers do that.
        parameters: The trainable parameters of this rank.
        two_pass: ``forward`` is the first pass, ``backward`` the second, whose schedule is given.
        statistics: Where deferred batch-norm layers collect, None if they are not deferred.
        metered: Count what the stages hold.
    """

    def __init__(
        self,
        share: Share,
        schedule: Schedule,
        transport: GroupTransport,
        *,
        seed: int,
        step: int,
        first: int = 0,
        head: Head | None = None,
        parameters: Sequence[Tensor] = (),
        two_pass: bool = False,
        statistics: Statistics | None = None,
        metered: bool = False,
    ) -> None:
        self._share = share
        self._schedule = schedule
        self._transport = transport
        self._parameters = parameters
        self._two_pass = two_pass
        self._supply: Supply | None = None
        self._context = CallerContext.capture([share.device])
        self._micro_batches = range(schedule.micro_batches)
        held = {k: stage.parameter_bytes for k, stage in share.stages.items()} if metered else {}
        self.recording = Recording([[]], Meters(held, len(share.hosts)) if metered else None)
        self._flights = {
            k: Flight(
                stage=stage,
                seed=seed,
                step=step,
                first_micro_batch=first,
                recomputed=frozenset(m for at, m in schedule.recomputed if at == k),
                statistics=statistics,
                head=head if k == share.last else None,
                two_pass=two_pass,
            )
            for k, stage in share.stages.items()
        }
        self._replicas = Replicas(share.tied, [share.device] * len(share.hosts))
        self.parts: dict[Tensor, list[Tensor | None]] = {}
        self._found: Found | None = None
        self._window = window(schedule) if two_pass else None
        gradients = torch.is_grad_enabled() and not two_pass
        self._open_channels(gradients or self._window is not None, gradients)

    def forward(self, inputs: Sequence[Boundary]) -> list[Boundary] | None:
        """Run all forwards; takes inputs where the first stage is, gives outputs where the last is, None elsewhere."""
        if (self._schedule.recomputed or self._two_pass) and torch.is_grad_enabled():
            self._found = Found([m for flight in self._flights.values() for m in flight.modules])
        if self._two_pass and self._share.is_first:
            self._supply = Supply(inputs, self.recording.meters)
        self._enter(inputs)
        self._follow("before")
        self._perform(self._actions("before"), self._context, window=self._window)
        return self._left()

    def backward(self, output_gradients: list[Gradients]) -> Finished:
        """Run what follows ``forward``; the output gradients are given where the last stage is, and taken from there.

        They are not held longer than the stage needs them.
        """
        if self._found is not None:
            self._found.check()
        if self._two_pass:
            self._open_channels(backward=True, skips_backward=True)
            self._enter(())
            if self._share.is_last:
                self._transport.connect(self._share.last, CALLER, Direction.FORWARD, Drain())
        while output_gradients:
            gradients = output_gradients.pop()
            self._transport.send(CALLER, self._share.last, Direction.BACKWARD, len(output_gradients), gradients)
            del gradients
        self._follow("after")
        with collected(self._parameters) as totals, self._found.restored() if self._found else nullcontext():
            self._perform(self._actions("after"), self._context.without_autocast(), repeats=self._two_pass)
            self._add_up()
        return self._finished(totals)

    def forward_and_backward(self, inputs: Sequence[Boundary], scale: Tensor) -> tuple[list[Boundary] | None, Finished]:
        """Run the whole schedule; where the last stage is, gives what its ``head`` made of every micro-batch.

        Args:
            inputs: Of every micro-batch, where the first stage is.
            scale: What the losses' gradient begins with.
        """
        self._enter(inputs)
        if self._share.is_last:
            for m in self._micro_batches:
                self._transport.send(CALLER, self._share.last, Direction.BACKWARD, m, [scale])
        self._follow("all")
        with collected(self._parameters) as totals:
            self._perform(self._actions("all"), self._context.without_autocast())
            self._add_up()
        return self._left(), self._finished(totals)

    def gathered(self, trees: Sequence[Any]) -> Any:
        """The last stage's outputs put together, on its account."""
        meters = self.recording.meters
        with nullcontext() if meters is None else meters.counting(self._share.last):
            return gather(trees)

    def _open_channels(self, backward: bool, skips_backward: bool) -> None:
        """Make ready for what a pass brings: a message of every micro-batch forward, and maybe one backward."""
        share, count, meters = self._share, self._schedule.micro_batches, self.recording.meters
        for before, after in zip(range(share.last), range(1, share.last + 1), strict=True):
            ends = (before, after, Direction.FORWARD), (after, before, Direction.BACKWARD)
            for source, target, direction in ends if backward else ends[:1]:
                if target in share.stages:
                    elsewhere = source not in share.stages
                    self._transport.open((source, target, direction), count if elsewhere else 0, meters)
        for k, stage in share.stages.items():
            for s in stage.ways.sources:
                self._transport.open((s, k, Direction.SKIP_FORWARD), 0 if s in share.stages else count, meters)
            for t in stage.ways.targets if skips_backward else ():
                self._transport.open((t, k, Direction.SKIP_BACKWARD), 0 if t in share.stages else count, meters)
        if share.is_first:
            self._transport.open((CALLER, 0, Direction.FORWARD), meters=meters)
            self._transport.open((0, CALLER, Direction.BACKWARD))
        if share.is_last:
            self._transport.open((share.last, CALLER, Direction.FORWARD))
            self._transport.open((CALLER, share.last, Direction.BACKWARD), meters=meters)

    def _actions(self, part: Part) -> Sequence[Action]:
        """What this rank does."""
        return _performed(self._schedule, self._share.worker, part, self._two_pass)

    def _follow(self, part: Part) -> None:
        """Let what passes between accelerators be issued in the order in which it comes."""
        hosts, ways = tuple(self._share.hosts), tuple(self._share.ways)
        window = self._window if part == "before" else None
        self._transport.follow(lambda: _order(self._schedule, part, self._two_pass, hosts, ways, window))

    def _enter(self, inputs: Sequence[Boundary]) -> None:
        if self._supply is not None:
            self._transport.connect(CALLER, 0, Direction.FORWARD, self._supply)
            return
        for m, boundary in enumerate(inputs):
            self._transport.send(CALLER, 0, Direction.FORWARD, m, boundary.copy())

    def _left(self) -> list[Boundary] | None:
        if not self._share.is_last:
            return None
        return [self._transport.receive(self._share.last, CALLER, Direction.FORWARD, m) for m in self._micro_batches]

    def _finished(self, totals: list[Tensor | None]) -> Finished:
        arrived: list[Gradients] = []
        if self._share.is_first:
            arrived = [self._transport.receive(0, CALLER, Direction.BACKWARD, m) for m in self._micro_batches]
        return Finished(self._parameters, [*arrived, [None]], totals)

    def _add_up(self) -> None:
        """Add up what the own cells gave to a tied parameter, unless cells on other ranks gave too."""
        shared = {s.parameter for s in self._share.shared}
        for parameter, parts in self._replicas.parts().items():
            if parameter in shared:
                parameter.grad, self.parts[parameter] = None, parts
            else:
                parameter.grad = added(parts, self._share.device)

    def _perform(self, actions: Sequence[Action], backward_modes: CallerContext, **options: Any) -> None:
        """Perform actions in this thread, which has the caller's modes already, but for what autocasts where."""
        stages, meters = len(self._share.hosts), self.recording.meters
        work = Work(self._flights, stages, self._transport, self._context, backward_modes, meters, **options)
        with self._context.applied(self._share.device), autocast_off(), ExitStack() as guards:
            guards.enter_context(self._replicas.in_place(list(self._share.stages)))
            for stage in self._share.stages.values():
                guards.enter_context(stage.draws.guard(str(stage)))
            perform(work, actions, self.recording.spans[0])


def _performed(schedule: Schedule, worker: int, part: Part, two_pass: bool) -> Sequence[Action]:
    """What a worker does before the loss over the mini-batch, after it, or altogether where there is none."""
    own = schedule.workers[worker]
    if two_pass:
        return passes(schedule)[0][worker] if part == "before" else own
    return own if part == "all" else [a for a in own if (a.kind == Kind.FORWARD) == (part == "before")]


@lru_cache(maxsize=64)
def _order(
    schedule: Schedule, part: Part, two_pass: bool, hosts: tuple[int, ...], ways: tuple[Ways, ...], window: int | None
) -> list[Passing]:
    """The order of the messages of all workers."""
    workers = [_performed(schedule, worker, part, two_pass) for worker in range(len(schedule.workers))]
    return message_order(workers, hosts, ways, window)


def deliver(done: Finished, parts: Sequence[Any]) -> None:
    """Hand a finished mini-batch's gradients to autograd: added to ``.grad``, hooks run, as behind a loss.

    Args:
        done: The gradients, with those of an input that is not there at the end.
        parts: Every micro-batch's input, with its graph, where the first stage is.
    """
    token = Boundary.of(torch.zeros((), requires_grad=True, device="cpu"))
    (ended,) = attach(done, [*parts, new_anchor()], [token])
    with autocast_off():
        ended.backward()


@dataclass
class _Collector:
    """A mini-batch whose backward only notes where the loss's gradients enter."""

    parameters: Sequence[Tensor] = ()
    output_gradients: list[Gradients] = field(default_factory=list)

    def backward(self, keep_graph: bool) -> tuple[list[Gradients], list[Tensor | None]]:
        return [[None]], []


def outputs_with_graph(outputs: Sequence[Boundary]) -> tuple[list[Any], _Collector]:
    """Every micro-batch's output for a loss; the collector gets the gradients when that goes backward."""
    collector = _Collector()
    return attach(collector, [new_anchor()], outputs), collector


def gradients_of(collector: _Collector, outputs: Sequence[Boundary]) -> list[Gradients]:
    """What a loss's backward left; no gradients where it did not depend on the outputs."""
    return collector.output_gradients or [[None] * len(output.leaves) for output in outputs]
