"""What ``gpipe plan`` found, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpipe.partitioning.partition import Partition
from gpipe.partitioning.units import readable_bytes, readable_seconds
from gpipe.training.config import PipelineConfig
from gpipe.training.hardware import Device
from gpipe.training.logs import tell
from gpipe.training.plan import Planning
from gpipe.training.plan_refusals import Refusal, summary
from gpipe.training.plan_schedules import FLUSHES, schedule_seconds

_FASTEST = 5  # rows of the table, besides the best of every number of stages and the configuration's own
_FILE_WIDTH = 160  # columns of a file or a pipe, which could take any number
_LAUNCHES = 100e-6  # seconds in which an accelerator begins the ten or twenty kernels of a cell, forward and backward


def report(planning: Planning, console: Console) -> None:
    """Print the table of choices, what was refused, and how to set the best."""
    for line in [*_assumptions(planning), ""]:
        tell(console, line)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    console.print(_table(planning))
    if any(planning.is_configured(len(choice.stages), choice.micro_batches) for choice in _shown(planning)):
        tell(console, "now: the stages and chunks that the configuration has.\n")
    if lines := summary(planning.found.refusals):
        tell(console, "\n".join(["Refused:", *(f"  {line}" for line in lines)]))
    tell(console, f"\nThe best, for the configuration file:\n\n{pipeline_yaml(planning)}")
    tell(console, str(planning.best))
    tell(console, f"\nSchedules for it, simulated: {_ranked(planning.best)}")


def _ranked(partition: Partition) -> str:
    """What a step of a choice takes under every schedule, fastest first."""
    seconds = schedule_seconds(partition)
    needs = {name: "" if name in FLUSHES else " (loss_over: micro_batch)" for name in seconds}
    return ", ".join(f"{name} {readable_seconds(s)}{needs[name]}" for name, s in seconds.items())


def pipeline_yaml(planning: Planning) -> str:
    """The section ``pipeline`` that sets the best choice, all else in it as it is."""
    best, own = planning.best, planning.configuration.pipeline
    section = own.model_dump(mode="json", exclude_unset=True) | {
        "stages": len(best.stages),
        "balance": list(best.balance),
        "chunks": best.micro_batches,
        "checkpoint": list(best.keep),
    }
    if isinstance(own.devices, list):
        del section["devices"]  # a list for other stages, perhaps of another machine
        if planning.measured:
            section["devices"] = [device.name for device in planning.devices[: len(best.stages)]]
    section = {key: section[key] for key in PipelineConfig.model_fields if key in section}
    return yaml.safe_dump({"pipeline": section}, sort_keys=False, default_flow_style=None, width=100)


def as_json(planning: Planning) -> dict[str, Any]:
    """All that was found, as plain data; the best choice is the first."""
    training = planning.configuration.training
    return {
        "costs": "measured" if planning.measured else "estimate",
        "schedule": "gpipe",
        "cells": planning.cells,
        "batch_size": training.batch_size,
        "precision": training.precision,
        "optimizer": {
            "name": planning.configuration.optimizer.name,
            "static_bytes_per_parameter_byte": planning.static_bytes_per_param,
            "counted": planning.static_counted,
        },
        "devices": [_device_json(device) for device in planning.devices],
        "choices": [
            {
                "stages": len(choice.stages),
                "chunks": choice.micro_batches,
                "balance": list(choice.balance),
                "keep": list(choice.keep),
                "seconds": choice.seconds,
                "lower_bound_seconds": choice.lower_bound,
                "samples_per_second": training.batch_size / choice.seconds,
                "bubble": _not_negative(choice.bubble),
                "recompute": choice.recompute,
                "bytes": list(choice.bytes),
                "configured": planning.is_configured(len(choice.stages), choice.micro_batches),
            }
            for choice in planning.found.choices
        ],
        "schedules_of_the_best": schedule_seconds(planning.best),
        "refused": [_refusal_json(refusal, planning) for refusal in planning.found.refusals],
    }


def _device_json(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "memory": device.memory,
        "flops": device.speed and device.speed.flops,
        "bytes_per_second": device.speed and device.speed.bytes,
        "link": device.link and device.link._asdict(),
        "source": device.source,
    }


def _refusal_json(refusal: Refusal, planning: Planning) -> dict[str, Any]:
    error = refusal.infeasible
    return {
        "stages": refusal.stages,
        "chunks": refusal.chunks,
        "reason": str(error or refusal.reason),
        "missing_bytes": error and error.missing_bytes,
        "memory_limit": error and error.memory_limit,
        "configured": planning.is_configured(refusal.stages, refusal.chunks),
    }


def _assumptions(planning: Planning) -> list[str]:
    name, held = planning.configuration.optimizer.name, planning.static_bytes_per_param
    counted = "" if planning.static_counted else ", an assumption"
    lines = [f"{count} x {_device_line(device)}" for device, count in _runs(planning.devices)]
    how = "measured on this machine" if planning.measured else "estimated from shapes"
    lines += [
        f"Costs are {how}; seconds are those of forward and backward, without loss and optimizer.",
        f"{name} holds {held:g} bytes per byte of parameters, gradient included{counted}.",
    ]
    best = planning.best
    if not planning.measured and best.seconds < _LAUNCHES * planning.cells * best.micro_batches / len(best.stages):
        lines.append(
            "The cells are so small that an accelerator takes longer to start its kernels than to run them, which no "
            "estimate counts: on the devices themselves, gpipe plan without --devices measures it."
        )
    return lines


def _device_line(device: Device) -> str:
    parts = ["no limit of memory" if device.memory is None else readable_bytes(device.memory)]
    if device.speed is not None:
        parts += [f"{device.speed.flops / 1e12:.4g} TFLOP/s", f"{device.speed.bytes / 1e9:.4g} GB/s"]
    if device.link is not None:
        parts.append(f"links {device.link.bandwidth / 1e9:.4g} GB/s after {readable_seconds(device.link.latency)}")
    return f"{device.name}: {', '.join(parts)}" + (f" ({device.source})" if device.source else "")


def _table(planning: Planning) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in ("", "stages", "chunks", "step", "samples/s", "bubble", "recompute", "peak", "of stage"):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("keep", "balance"):
        table.add_column(head, overflow="fold", min_width=len(head))
    rows = planning.configuration.training.batch_size
    for choice in _shown(planning):
        is_best = choice is planning.best
        marks = [
            mark
            for mark, holds in (
                ("best", is_best),
                ("now", planning.is_configured(len(choice.stages), choice.micro_batches)),
            )
            if holds
        ]
        peak = max(choice.bytes)
        table.add_row(
            " ".join(marks),
            str(len(choice.stages)),
            str(choice.micro_batches),
            readable_seconds(choice.seconds),
            _rate(rows / choice.seconds),
            f"{_not_negative(choice.bubble):.1%}",
            f"{choice.recompute:.1%}",
            readable_bytes(peak),
            str(choice.bytes.index(peak)),
            _keep(choice),
            _list(choice.balance),
            style="bold" if is_best else None,
        )
    return table


def _shown(planning: Planning) -> list[Partition]:
    """The fastest, the fastest of every number of stages, and what the configuration has now."""
    choices = planning.found.choices
    stages: set[int] = set()
    shown = []
    for i, choice in enumerate(choices):
        if (
            i < _FASTEST
            or len(choice.stages) not in stages
            or planning.is_configured(len(choice.stages), choice.micro_batches)
        ):
            shown.append(choice)
        stages.add(len(choice.stages))
    return shown


def _not_negative(share: float) -> float:
    """A single stage has no bubble, but for rounding, which may leave a minus."""
    return max(0.0, share)


def _rate(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _keep(choice: Partition) -> str:
    if set(choice.keep) == {choice.micro_batches}:
        return "all"
    return str(choice.keep[0]) if len(set(choice.keep)) == 1 else _list(choice.keep)


def _list(values: Sequence[int]) -> str:
    """``3 4 4``; equal neighbours counted, where there are many: ``3 4(x9)``."""
    if len(values) <= 8:
        return " ".join(map(str, values))
    return " ".join(str(value) if count == 1 else f"{value}(x{count})" for value, count in _runs(values))


def _runs(values: Sequence[Any]) -> list[tuple[Any, int]]:
    return [(value, len(list(group))) for value, group in groupby(values)]
