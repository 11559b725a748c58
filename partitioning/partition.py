"""A division of cells into stages, what it is predicted to cost, and why."""

from __future__ import annotations

from dataclasses import dataclass

from gpipe.partitioning.problem import ScheduleName
from gpipe.partitioning.units import columns, readable_bytes, readable_seconds


@dataclass(frozen=True)
class StagePlan:
    """One stage of a partition. Seconds are those of one micro-batch on the stage's device, bytes those of its peak.

    Attributes:
        cells: Number of cells.
        first_cell: Name of the first.
        last_cell: Name of the last.
        largest_cell: Name of the one that takes most of the stage's time.
        keep: Micro-batches that keep their activations; the others are recomputed.
        recomputed: Micro-batches that are recomputed.
        in_flight: Micro-batches that are forward and not yet backward, at most.
        forward_seconds: One forward, or one recompute.
        backward_seconds: One backward, without recompute.
        arrival_seconds: What the input takes from the stage before, with values that skip stages on their way.
        static_bytes: Parameters, gradients and optimizer state.
        input_bytes: The inputs that lie on the device, values that skipped stages among them, and gradients that wait
            there if they are known.
        output_bytes: The model's outputs and their gradients, on the last stage.
        activation_bytes: What autograd keeps of all micro-batches.
        further_bytes: What keeping one more micro-batch adds.
        workspace_bytes: What comes and goes while a cell runs.
        memory_limit: Bytes of the device; None if not limited.
    """

    cells: int
    first_cell: str
    last_cell: str
    largest_cell: str
    keep: int
    recomputed: int
    in_flight: int
    forward_seconds: float
    backward_seconds: float
    arrival_seconds: float
    static_bytes: int
    input_bytes: int
    output_bytes: int
    activation_bytes: int
    further_bytes: int
    workspace_bytes: int
    memory_limit: int | None

    @property
    def bytes(self) -> int:
        """The stage's peak."""
        moving = self.input_bytes + self.output_bytes + self.activation_bytes
        return self.static_bytes + moving + self.workspace_bytes

    @property
    def free_bytes(self) -> float:
        """What the device has left at the peak; infinite if not limited."""
        return float("inf") if self.memory_limit is None else self.memory_limit - self.bytes

    @property
    def recompute_seconds(self) -> float:
        """Spent on recompute in one step."""
        return self.recomputed * self.forward_seconds

    @property
    def names(self) -> str:
        """The cells, in words."""
        return self.first_cell if self.cells == 1 else f"{self.first_cell} .. {self.last_cell}"


@dataclass(frozen=True)
class Partition:
    """A division of cells into stages, and what a step of it is predicted to cost; ``print`` it.

    Attributes:
        schedule: ``"gpipe"`` or ``"1f1b"``.
        micro_batches: M.
        seconds: One step: forward and backward of all micro-batches, without loss and optimizer.
        lower_bound: Seconds below which no division is: how far this one can be from the best. None if not known.
        stages: From the model's input to its output.
    """

    schedule: ScheduleName
    micro_batches: int
    seconds: float
    lower_bound: float | None
    stages: tuple[StagePlan, ...]

    @property
    def balance(self) -> tuple[int, ...]:
        """Cells per stage."""
        return tuple(stage.cells for stage in self.stages)

    @property
    def keep(self) -> tuple[int, ...]:
        """Per stage how many micro-batches keep their activations."""
        return tuple(stage.keep for stage in self.stages)

    @property
    def bytes(self) -> tuple[int, ...]:
        """Peak bytes per stage."""
        return tuple(stage.bytes for stage in self.stages)

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Per stage the seconds of a step in which it computes, recompute included."""
        return tuple(
            self.micro_batches * (s.forward_seconds + s.backward_seconds) + s.recompute_seconds for s in self.stages
        )

    @property
    def bubble(self) -> float:
        """The share of the stages' time in which they do not compute, 0 to 1."""
        return 1 - sum(self.busy_seconds) / (len(self.stages) * self.seconds) if self.seconds else 0.0

    @property
    def recompute(self) -> float:
        """The share of the stages' time spent on recompute, 0 to 1."""
        spent = sum(stage.recompute_seconds for stage in self.stages)
        return spent / (len(self.stages) * self.seconds) if self.seconds else 0.0

    @property
    def binds(self) -> int:
        """The stage that is busy longest, which all others wait for."""
        busy = self.busy_seconds
        return busy.index(max(busy))

    @property
    def fullest(self) -> int | None:
        """The stage whose limit costs most recompute or, without recompute, leaves least; None if none is limited."""
        limited = [k for k, stage in enumerate(self.stages) if stage.memory_limit is not None]
        if not limited:
            return None
        return max(limited, key=lambda k: (self.stages[k].recompute_seconds, -self.stages[k].free_bytes))

    def __str__(self) -> str:
        return "\n".join([self._summary(), "", self._table(), "", *self._advice()])

    def _summary(self) -> str:
        known = "" if self.lower_bound is None else f" (at most {self._above:.2%} above the best division)"
        return (
            f"{len(self.stages)} stages, {self.micro_batches} micro-batches, {self.schedule}: "
            f"{readable_seconds(self.seconds)} a step{known}, bubble {self.bubble:.1%}, recompute {self.recompute:.1%}"
        )

    @property
    def _above(self) -> float:
        return self.seconds / self.lower_bound - 1 if self.lower_bound else 0.0

    def _table(self) -> str:
        head = "stage cells forward backward busy keep static inputs outputs activations workspace peak limit"
        rows = [head.split()]
        for k, (stage, busy) in enumerate(zip(self.stages, self.busy_seconds, strict=True)):
            limit = "-" if stage.memory_limit is None else readable_bytes(stage.memory_limit)
            moving = [stage.input_bytes, stage.output_bytes, stage.activation_bytes]
            sizes = [stage.static_bytes, *moving, stage.workspace_bytes, stage.bytes]
            rows.append(
                [
                    str(k),
                    f"{stage.cells}: {stage.names}",
                    readable_seconds(stage.forward_seconds),
                    readable_seconds(stage.backward_seconds),
                    f"{busy / self.seconds:.1%}" if self.seconds else "-",
                    f"{stage.keep}/{self.micro_batches}",
                    *map(readable_bytes, sizes),
                    limit,
                ]
            )
        return columns(rows)

    def _advice(self) -> list[str]:
        busy = self.busy_seconds
        slowest = self.stages[self.binds]
        mean = sum(busy) / len(busy)
        lines = []
        if max(busy) > 1.02 * mean:
            many = f"its largest cell is {slowest.largest_cell!r}" if slowest.cells > 1 else "it is a single cell"
            lines.append(
                f"Time: stage {self.binds} ({slowest.names}) is busy {max(busy) / mean - 1:.1%} longer than the "
                f"average stage, and the others wait for it; {many}: smaller cells divide more evenly."
            )
        else:
            lines.append(
                "Time: the stages are even; what is left is the bubble, and more micro-batches make it smaller."
            )
        if self.fullest is not None:
            lines.append(f"Memory: {self._memory(self.fullest)}")
        return lines

    def _memory(self, k: int) -> str:
        stage = self.stages[k]
        if not stage.recomputed:
            return f"nothing is recomputed; stage {k} has least left, {readable_bytes(stage.free_bytes)}."
        spent = (
            f"stage {k} recomputes {stage.recomputed} micro-batches, {readable_seconds(stage.recompute_seconds)} a step"
        )
        held = max(stage.keep, 1) if self.schedule == "gpipe" else stage.keep + 1
        if held >= stage.in_flight:
            return f"{spent}, though more fit: keep={self.micro_batches} recomputes none."
        one, all_ = (stage.further_bytes * n - stage.free_bytes for n in (1, stage.in_flight - held))
        if all_ <= 0:
            return f"{spent}, though more fit: keep=None keeps as many as fit."
        if one <= 0 or one == all_:
            return f"{spent}: {readable_bytes(all_)} more would keep all."
        return f"{spent}: {readable_bytes(one)} more would keep one more, {readable_bytes(all_)} more all."
