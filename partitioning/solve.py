"""The best division of cells into stages for given devices: the front door to the solver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gpipe.partitioning.arguments import problem_of, whole
from gpipe.partitioning.cost import CellCost
from gpipe.partitioning.infeasible import Infeasible, explained
from gpipe.partitioning.makespan import divided, step_seconds
from gpipe.partitioning.partition import Partition, StagePlan
from gpipe.partitioning.problem import NO_LIMIT, Ints, Link, Problem, ScheduleName
from gpipe.partitioning.search import best_division

__all__ = ["Infeasible", "Link", "Partition", "StagePlan", "predict", "solve"]


def solve(
    costs: Sequence[CellCost],
    stages: int,
    *,
    micro_batches: int,
    schedule: ScheduleName = "gpipe",
    memory_limit: int | Sequence[int | None] | None = None,
    keep: int | Sequence[int] | None = None,
    static_bytes_per_param: float = 4.0,
    links: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
    device_speeds: Sequence[float] | None = None,
    input_bytes: int = 0,
) -> Partition:
    """Divide a chain of cells into the stages whose step takes the fewest seconds.

    A step is the longest path through the schedule's actions: stage k recomputes all micro-batches it does not keep,
    each just before its backward and ahead of the wait for its gradient. Under GPipe with all or none kept and free
    links this is sum F + sum B + (M - 1) (max F + max B), the recompute in B. Stages whose memory lets them keep some
    change their pace in the course of the backward, and the path is followed through these changes.

    A stage holds ``static_bytes_per_param`` times its parameters, the inputs of its micro-batches, the activations of
    those it keeps (of one, if it recomputes all), and what comes and goes while a cell runs; the last one the outputs
    and their gradients too; see ``Problem.bytes``. What the loss holds beside these belongs to no cell.

    Args:
        costs: One for every cell, for one micro-batch, in order.
        stages: Number of stages K, 1 to the number of cells. None is left empty.
        micro_batches: Number of micro-batches M a mini-batch is split into.
        schedule: ``"gpipe"``: all forward, then all backward, the last first; the last ``keep`` are kept. ``"1f1b"``:
            one forward, one backward in turn with K - k micro-batches in flight; the first ``keep`` are kept.
        memory_limit: Bytes of every device, or one per stage; None where there is no limit.
        keep: Micro-batches that keep their activations, 0 to M, or one number per stage. None keeps as many as fit.
        static_bytes_per_param: Bytes held all step long per byte of parameter: 1 for the parameter, 1 for its gradient,
            and the optimizer's state: 2.0 for plain SGD, 3.0 with momentum, 4.0 for Adam in the parameters' precision.
        links: (latency in seconds, bandwidth in bytes per second) of every link between two stages, or one pair per
            link, from the first stage on. None: messages take no time. What skips stages goes over the links between.
        device_speeds: How fast every stage's device is, relative to the one the costs are from. None: as fast.
        input_bytes: One micro-batch of the model's input, which the first stage holds as others hold their boundary.

    Returns:
        The partition with the fewest predicted seconds; ``lower_bound`` says how far the best can be.

    Raises:
        ValueError: An argument is not what is described here; the message says what to do.
        Infeasible: No division fits the memory. A ``ValueError`` that says what is missing where, and what would do.
    """
    problem = problem_of(
        costs,
        stages,
        micro_batches,
        schedule,
        memory_limit,
        keep,
        static_bytes_per_param,
        links,
        device_speeds,
        input_bytes,
    )
    division = best_division(problem)
    if division is None:
        raise explained(problem)
    return _partition(problem, division.cuts, division.seconds, division.bound)


def predict(
    costs: Sequence[CellCost],
    balance: Sequence[int],
    *,
    micro_batches: int,
    schedule: ScheduleName = "gpipe",
    keep: int | Sequence[int] | None = None,
    static_bytes_per_param: float = 4.0,
    links: tuple[float, float] | Sequence[tuple[float, float]] | None = None,
    device_speeds: Sequence[float] | None = None,
    input_bytes: int = 0,
) -> Partition:
    """What a given division would cost.

    Args:
        costs: One for every cell, for one micro-batch, in order.
        balance: Number of cells of every stage.
        micro_batches: As for ``solve``, like all that follows; ``keep=None`` keeps all.
        schedule: The order of forward and backward.
        keep: Micro-batches that keep their activations.
        static_bytes_per_param: Bytes held per byte of parameter.
        links: Latency and bandwidth between stages.
        device_speeds: Relative speeds.
        input_bytes: One micro-batch of the model's input.

    Raises:
        ValueError: An argument is not what is described here; the message says what to do.
    """
    sizes = [whole("balance", size, 1, None, "") for size in balance]
    if sum(sizes) != len(costs):
        raise ValueError(f"balance must sum to the number of cells, {len(costs)}, got {sizes} of sum {sum(sizes)}")
    problem = problem_of(
        costs,
        len(sizes),
        micro_batches,
        schedule,
        None,
        keep,
        static_bytes_per_param,
        links,
        device_speeds,
        input_bytes,
    )
    cuts = np.cumsum([0, *sizes])
    return _partition(problem, cuts, float(step_seconds(problem, cuts[None])[0]), None)


def _partition(problem: Problem, cuts: Ints, seconds: float, bound: float | None) -> Partition:
    times = divided(problem, cuts[None])
    plans = []
    for k in range(problem.stages):
        first, end = cuts[k : k + 1], cuts[k + 1 : k + 2]
        cells = problem.cells[int(first[0]) : int(end[0])]
        size = problem.bytes(k, first, end, times.keep[:, k])
        static, inputs, outputs, activations, workspace = (int(part.max()) for part in size)
        kept = int(times.keep[0, k])
        plans.append(
            StagePlan(
                cells=len(cells),
                first_cell=cells[0].name,
                last_cell=cells[-1].name,
                largest_cell=max(cells, key=lambda cell: cell.forward_seconds + cell.backward_seconds).name,
                keep=kept,
                recomputed=problem.micro_batches - kept,
                in_flight=problem.in_flight(k),
                forward_seconds=float(times.forward[0, k]),
                backward_seconds=float(times.backward[0, k]),
                arrival_seconds=float(times.transit[0, k]),
                static_bytes=static,
                input_bytes=inputs,
                output_bytes=outputs,
                activation_bytes=activations,
                further_bytes=int(problem.further_bytes(first, end).max()),
                workspace_bytes=workspace,
                memory_limit=None if problem.limits[k] >= NO_LIMIT else problem.limits[k],
            )
        )
    return Partition(problem.schedule, problem.micro_batches, seconds, bound, tuple(plans))
