"""Stages on disjoint parts of one device, beside the simulator: kernels that overlap, launched by real threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import gpipe
from benchmarks.device_parts.bench import Bench, CannotRun, encoder, in_turns, part
from benchmarks.device_parts.speed import stepped
from gpipe import minibatch
from gpipe.boundary import map_message
from gpipe.costs import StageCost
from gpipe.schedules import builder
from gpipe.transport import CALLER, Direction, ThreadTransport

MICRO_BATCHES = 8


@part(120)
def several(bench: Bench) -> None:
    """Two and four stages, each on a part of the device that is its alone, beside simulate and beside one stream."""
    width, sequence, rows, each = bench.size((1024, 512, 64, 3), (64, 4, 8, 1))
    dtype = torch.bfloat16
    for stages in (2, 4):
        streams, multiprocessors = disjoint(bench, stages)
        model = encoder(stages * each, width).to(bench.device)
        x, y = torch.randn(2, rows, sequence, width, device=bench.device)
        costs = [alone(bench, model[k * each : (k + 1) * each], x, stream, dtype) for k, stream in enumerate(streams)]
        bench.say(
            K=stages,
            multiprocessors_each=multiprocessors,
            forward_ms=[round(1e3 * c.forward_seconds, 3) for c in costs],
            backward_ms=[round(1e3 * c.input_gradient_seconds, 3) for c in costs],
        )
        options: dict[str, Any] = {"chunks": MICRO_BATCHES, "checkpoint": "never"}
        pipe = gpipe.GPipe(model, [each] * stages, devices=[bench.device] * stages, **options)

        def step(schedule: str, pipe: gpipe.GPipe = pipe, x: Tensor = x, y: Tensor = y) -> None:
            with bench.autocast(dtype):
                stepped(pipe, x, y, nn.MSELoss(), schedule)

        for schedule in ("gpipe", "one_f_one_b"):
            simulated = 1e3 * gpipe.simulate(builder(schedule)(stages, MICRO_BATCHES), costs).makespan
            run = partial(step, schedule)
            with on_streams(streams):
                found = in_turns(bench, {"parts": run}, rounds=bench.size(4, 1))["parts"]
            one = in_turns(bench, {"whole": run}, rounds=bench.size(4, 1))["whole"]
            times = {"ms": found.ms, "launch_ms": found.launch_ms, "simulated_ms": simulated}
            ratios = {"over_simulated": found.ms / simulated, "one_stream_whole_device_ms": one.ms}
            bench.say(K=stages, micro_batches=MICRO_BATCHES, schedule=schedule, **times, **ratios)
        races = bench.races()
        if races:
            bench.say(K=stages, races=races[:3])


def alone(bench: Bench, stage: nn.Module, x: Tensor, stream: torch.Stream, dtype: torch.dtype) -> StageCost:
    """A stage's seconds on its part of the device, nothing else running."""
    own = x.chunk(MICRO_BATCHES)[0].clone().requires_grad_()
    bench.synchronize()
    here = torch.accelerator.current_stream(bench.device)

    def forward() -> Tensor:
        with stream, bench.autocast(dtype):
            y: Tensor = stage(own)
        here.wait_stream(stream)
        return y

    gradient = torch.randn_like(forward())

    def both() -> None:
        y = forward()
        with stream:
            y.backward(gradient)  # type: ignore[no-untyped-call]
        here.wait_stream(stream)

    bench.synchronize()
    found = in_turns(bench, {"forward": forward, "both": both})
    forward_ms, both_ms = found["forward"].ms, found["both"].ms
    stage.zero_grad()
    return StageCost(forward_ms / 1e3, max(0.0, both_ms - forward_ms) / 1e3, 0.0)


# --- parts of a device ------------------------------------------------------------------------------------------------


def disjoint(bench: Bench, count: int) -> tuple[list[torch.Stream], int]:
    """Streams, each on a part of the multiprocessors that is its alone, and how many these are.

    ``torch.cuda.green_contexts`` cuts each part from the whole device, so that two get the same multiprocessors: the
    device is divided here by one call of the driver.

    Raises:
        CannotRun: There is no such division here.
    """
    if bench.simulated:
        return [torch.Stream(bench.device) for _ in range(count)], 0
    if bench.device.type != "cuda":
        raise CannotRun(f"needs CUDA's green contexts, this is a device of type {bench.device.type}")
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CannotRun(f"needs the package cuda-bindings, which torch brings for CUDA 13: {error}") from error

    def ok(result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise CannotRun(f"the driver does not divide this device: {result[0]}")
        return result[1] if len(result) == 2 else result[1:]

    torch.zeros(1, device=bench.device)
    device = ok(driver.cuDeviceGet(bench.device.index))
    whole = ok(driver.cuDeviceGetDevResource(device, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM))
    each = whole.sm.smCount // count // 8 * 8
    groups, made, _ = ok(driver.cuDevSmResourceSplitByCount(count, whole, 0, each))
    if made < count:
        raise CannotRun(f"the driver divides this device into {made} parts of {each} multiprocessors, not {count}")
    streams: list[torch.Stream] = []
    for group in groups[:count]:
        description = ok(driver.cuDevResourceGenerateDesc([group], 1))
        flag = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = ok(driver.cuGreenCtxCreate(description, device, flag))
        stream = ok(driver.cuGreenCtxStreamCreate(context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0))
        external = torch.cuda.ExternalStream(int(stream), device=bench.device)
        # as torch.accelerator's: its events and those of torch.cuda's streams do not go together
        ids = {name: getattr(external, name) for name in ("stream_id", "device_index", "device_type")}
        streams.append(torch.Stream(**ids))
    return streams, groups[0].sm.smCount


@contextmanager
def on_streams(streams: Sequence[torch.Stream]) -> Iterator[None]:
    """Let stage k of pipes on one device compute on ``streams[k]`` inside."""

    class OnStreams(ThreadTransport):
        """Messages that are waited for on the stream of the stage that takes them."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._events: dict[tuple[int, int, Direction, int], torch.Event] = {}

        def send(self, source: int, target: int, direction: Direction, micro_batch: int, message: Any) -> None:
            stream = torch.accelerator.current_stream(streams[0].device)
            self._events[source, target, direction, micro_batch] = stream.record_event()
            super().send(source, target, direction, micro_batch, message)

        def receive(self, source: int, target: int, direction: Direction, micro_batch: int) -> Any:
            message = super().receive(source, target, direction, micro_batch)
            if target != CALLER:
                torch.accelerator.set_stream(streams[target])  # of the worker's thread, until its actions are done
            stream = torch.accelerator.current_stream(streams[0].device)
            stream.wait_event(self._events.pop((source, target, direction, micro_batch)))
            if target == CALLER:  # parameters' gradients too
                for other in streams:
                    stream.wait_stream(other)

            def used(tensor: Tensor) -> Tensor:
                if tensor.device == stream.device:
                    tensor.record_stream(stream)
                return tensor

            return map_message(message, used)

    minibatch.ThreadTransport = OnStreams  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        minibatch.ThreadTransport = ThreadTransport  # type: ignore[attr-defined]
