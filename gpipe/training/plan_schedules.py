"""What a partition takes under other schedules than the one it was made for."""

from __future__ import annotations

from math import inf

from gpipe import schedules
from gpipe.costs import StageCost
from gpipe.partitioning.partition import Partition
from gpipe.simulate import simulate

FLUSHES = ("gpipe", "gpipe_zero_bubble")
"""Schedules under which the loss may see the whole mini-batch."""


def schedule_seconds(partition: Partition) -> dict[str, float]:
    """Simulated seconds of a step by schedule, fastest first; half of a backward is taken to be that of the weights.

    Interleaved stages are left out: they need fewer devices than there are stages.
    """
    costs = [
        StageCost(stage.forward_seconds, stage.backward_seconds / 2, stage.backward_seconds / 2)
        for stage in partition.stages
    ]
    links = [(stage.arrival_seconds, inf) for stage in partition.stages[1:]]
    found = {}
    for name, build in schedules.BUILDERS.items():
        if name == "interleaved_one_f_one_b":
            continue
        schedule = build(stages=len(costs), micro_batches=partition.micro_batches)
        found[name] = simulate(schedules.with_recompute(schedule, partition.keep), costs, links).makespan
    return dict(sorted(found.items(), key=lambda item: item[1]))
