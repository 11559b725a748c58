"""Why no division fits, and what would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gpipe.partitioning.bottleneck import Scores, best_of_first, cuts_from, widest
from gpipe.partitioning.cost import SkipCost
from gpipe.partitioning.problem import NO_LIMIT, Floats, Ints, Problem
from gpipe.partitioning.search import first_division
from gpipe.partitioning.units import readable_bytes

Bools = NDArray[np.bool_]

_MORE_CHUNKS = 512  # times as many micro-batches as were asked for are tried, at most
_MORE_STAGES = 8  # times as many stages


class Infeasible(ValueError):
    """No division of the cells fits the devices.

    Attributes:
        stage: The stage that lacks most in the division that lacks least.
        cells: Names of that stage's first and last cell.
        missing_bytes: What it lacks.
        memory_limit: Limits that would do, each larger by what is missing; None where there was none.
        stages: The smallest number of stages that would do, on devices of the same limit; None if none was found.
        micro_batches: The smallest number of micro-batches of the same mini-batch that would do; None if there is none.
        keep: Micro-batches to keep that would do where more were asked for; None otherwise.
    """

    def __init__(
        self,
        message: str,
        *,
        stage: int,
        cells: tuple[str, str],
        missing_bytes: int,
        memory_limit: tuple[int | None, ...],
        stages: int | None,
        micro_batches: int | None,
        keep: int | None,
    ) -> None:
        super().__init__(message)
        self.stage, self.cells, self.missing_bytes = stage, cells, missing_bytes
        self.memory_limit, self.stages, self.micro_batches, self.keep = memory_limit, stages, micro_batches, keep


def explained(problem: Problem) -> Infeasible:
    """The error for a problem that no division solves.

    Args:
        problem: The chain and its devices.
    """
    cuts, missing = least_missing(problem)
    lacking = [_missing(problem, k, cuts[k : k + 1], cuts[k + 1 :][:1])[0] for k in range(problem.stages)]
    k = int(np.argmax(lacking))
    names = problem.cells[cuts[k]].name, problem.cells[cuts[k + 1] - 1].name
    limits = tuple(None if limit >= NO_LIMIT else limit + missing for limit in problem.limits)
    more = fewest_stages(problem)
    chunks = fewest_micro_batches(problem)
    keep = _less_kept(problem)
    message = " ".join(
        [
            f"no division of {problem.count} cells into {problem.stages} stages fits the memory. In the one that comes "
            f"closest,",
            _needs(problem, k, int(cuts[k]), int(cuts[k + 1])),
            f"{readable_bytes(missing)} ({missing} bytes) too much.",
            *_remedies(problem, limits, more, chunks, keep),
        ]
    )
    return Infeasible(
        message,
        stage=k,
        cells=names,
        missing_bytes=missing,
        memory_limit=limits,
        stages=more,
        micro_batches=chunks,
        keep=keep,
    )


def least_missing(problem: Problem) -> tuple[Ints, int]:
    """The division whose neediest stage exceeds its limit least, and by how many bytes; negative if it fits.

    Args:
        problem: The chain and its devices.
    """
    width = min(problem.count, 2 * -(-problem.count // problem.stages))
    while True:
        best, choice = best_of_first(Scores(problem, lambda k, a, b: _missing(problem, k, a, b), width))
        missing = int(best[-1, -1])
        raised = replace(problem, limits=tuple(max(limit + missing, 0) for limit in problem.limits))
        needed = widest(raised, np.inf)
        if needed <= width:
            return cuts_from(choice), missing
        width = needed


def fewest_stages(problem: Problem) -> int | None:
    """The smallest number of stages into which the cells fit, on devices of the same limit; None if none was found.

    Args:
        problem: The chain and its devices.
    """
    alike = len(set(problem.limits)) == 1 and len(set(problem.keep or (0,))) == 1
    if not alike:
        return None
    most = min(problem.count, _MORE_STAGES * problem.stages)
    whole = _with_stages(problem, most)
    width = widest(whole, np.inf)
    rest = np.zeros(problem.count + 1, dtype=bool)  # whether the cells from n on fit the stages so far
    rest[-1] = True
    scores = Scores(whole, lambda k, a, b: _missing(whole, k, a, b), width)
    for stages in range(1, most + 1):
        few = _with_stages(problem, stages)
        ends = np.arange(1, problem.count + 1)
        if (rest[ends] & (_missing(few, 0, np.zeros_like(ends), ends) <= 0)).any():
            return stages
        rest = np.concatenate([*_fitting(scores, most - stages, rest), np.zeros(1, dtype=bool)])
    return None


def fewest_micro_batches(problem: Problem) -> int | None:
    """The smallest number of micro-batches that fits, None if none was found.

    The mini-batch stays the same, so the bytes of one micro-batch shrink as their number grows.

    Args:
        problem: The chain and its devices.
    """
    low = high = problem.micro_batches
    if first_division(_without_activations(problem)) is None:
        return None
    while first_division(_with_micro_batches(problem, high)) is None:
        low, high = high, 2 * high
        if high > _MORE_CHUNKS * problem.micro_batches:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if first_division(_with_micro_batches(problem, middle)) is None:
            low = middle
        else:
            high = middle
    return high


def _fitting(scores: Scores, k: int, rest: Bools) -> Iterator[Bools]:
    """Per first cell whether a stage ``k`` fits that is followed by cells which fit the stages behind."""
    for firsts in scores.blocks(0, scores.problem.count - 1):
        ends, missing = scores.after(k, firsts)
        yield np.asarray(((missing <= 0) & rest[ends]).any(axis=1))


def _less_kept(problem: Problem) -> int | None:
    if problem.keep is None or max(problem.keep) <= problem.least_keep:
        return None
    least = problem.least_keep
    return least if first_division(replace(problem, keep=(least,) * problem.stages)) is not None else None


def _missing(problem: Problem, k: int, first: Ints, end: Ints) -> Floats:
    """Bytes by which stage ``k`` exceeds its limit; negative if it does not."""
    return (problem.least_bytes(k, first, end) - problem.limits[k]).astype(np.float64)


def _with_stages(problem: Problem, stages: int) -> Problem:
    keep = None if problem.keep is None else (problem.keep[0],) * stages
    return replace(
        problem, stages=stages, limits=problem.limits[:1] * stages, keep=keep, speeds=(1.0,) * stages, links=None
    )


def _without_activations(problem: Problem) -> Problem:
    """What is left of a problem as its micro-batches become ever smaller and more."""
    part = 1 if problem.schedule == "gpipe" else 0  # GPipe holds the inputs of all micro-batches, 1F1B of a few

    def bare(skip: SkipCost) -> SkipCost:
        return replace(
            skip, value_bytes=part * skip.value_bytes, handed_on_bytes=0, gradient_bytes=0, gradient_storage_bytes=0
        )

    cells = [
        replace(
            cell,
            activation_bytes=0,
            workspace_bytes=0,
            boundary_bytes=part * cell.boundary_bytes,
            skips=tuple(bare(skip) for skip in cell.skips),
        )
        for cell in problem.cells
    ]
    return replace(problem, cells=cells)


def _with_micro_batches(problem: Problem, micro_batches: int) -> Problem:
    def smaller(count: int) -> int:
        return -(-count * problem.micro_batches // micro_batches)

    def less_known(count: int | None) -> int | None:
        return None if count is None else smaller(count)

    def less(skip: SkipCost) -> SkipCost:
        return replace(
            skip,
            value_bytes=smaller(skip.value_bytes),
            kept_bytes=less_known(skip.kept_bytes),
            handed_on_bytes=smaller(skip.handed_on_bytes),
            gradient_bytes=less_known(skip.gradient_bytes),
            gradient_storage_bytes=less_known(skip.gradient_storage_bytes),
        )

    cells = [
        replace(
            cell,
            activation_bytes=smaller(cell.activation_bytes),
            boundary_bytes=smaller(cell.boundary_bytes),
            workspace_bytes=smaller(cell.workspace_bytes),
            kept_input_bytes=less_known(cell.kept_input_bytes),
            handed_on_bytes=smaller(cell.handed_on_bytes),
            skips=tuple(less(skip) for skip in cell.skips),
        )
        for cell in problem.cells
    ]
    return replace(problem, cells=cells, input_bytes=smaller(problem.input_bytes), micro_batches=micro_batches)


def _undivided(problem: Problem) -> str:
    """Why more stages do not help."""
    most = min(problem.count, _MORE_STAGES * problem.stages)
    first = np.arange(problem.count)
    alone = _with_stages(problem, max(most, 2)).least_bytes(max(most, 2) - 1, first, first + 1)
    if (largest := int(alone.max())) <= problem.limits[0]:
        return f"No number of stages up to {most} would do."
    name = problem.cells[int(alone.argmax())].name
    return f"No number of stages would do: cell {name!r} alone needs {readable_bytes(largest)}, so split it."


def _needs(problem: Problem, k: int, first: int, end: int) -> str:
    wanted = problem.least_keep if problem.keep is None else problem.keep[k]
    parts = problem.bytes(k, np.array([first]), np.array([end]), np.array([wanted]))
    total = int(parts.total.max())
    cells = problem.cells[first:end]
    which = f"cell {cells[0].name!r} alone" if len(cells) == 1 else f"cells {cells[0].name!r} to {cells[-1].name!r}"
    static, inputs, outputs, activations, workspace = (readable_bytes(int(part.max())) for part in parts)
    return (
        f"stage {k} ({which}) needs {readable_bytes(total)} of {readable_bytes(problem.limits[k])} (parameters and "
        f"optimizer {static}, inputs of {problem.inputs_held(k)} micro-batches {inputs}, outputs {outputs}, "
        f"activations {activations}, workspace {workspace}):"
    )


def _remedies(
    problem: Problem, limits: tuple[int | None, ...], stages: int | None, chunks: int | None, keep: int | None
) -> list[str]:
    same = len(set(limits)) == 1
    one = f"memory_limit={limits[0]} ({readable_bytes(limits[0] or 0)})"
    would = [one if same else f"memory_limit={list(limits)}"]
    if stages is not None:
        would.append(f"{stages} stages")
    if chunks is not None:
        would.append(
            f"{chunks} micro-batches of the same mini-batch (activations, boundaries and workspace of one micro-batch "
            f"shrink to {problem.micro_batches / chunks:.2g} of what they are)"
        )
    if keep is not None:
        would.append(f"keep={keep}")
    text = ["Would do: " + "; or ".join(would) + "."]
    if stages is None and same:
        text.append(_undivided(problem))
    if chunks is None:
        text.append("No number of micro-batches would do.")
    return text
