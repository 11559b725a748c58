"""From a checked configuration to the things that train: model, pipe, loss, data, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from gpipe.training.checking import Loss, loss_state
from gpipe.training.config import Configuration, Factory, PipelineConfig
from gpipe.training.data import Data, build_data
from gpipe.training.engine import Engine, ThreadEngine
from gpipe.training.errors import ConfigurationError
from gpipe.training.factory import FactoryError, checked_arguments, located, resolve
from gpipe.training.optimizer import optimizer_class
from gpipe.training.rank_engine import RankEngine, divide
from gpipe.training.world import Ranks, World


@dataclass(frozen=True)
class Plan:
    """A configuration whose factories are found and accept their arguments; nothing is built yet.

    Attributes:
        source: The file, for messages.
        configuration: What it says.
        model: Builds the model.
        loss: Builds the loss.
    """

    source: str
    configuration: Configuration
    model: Callable[[], nn.Module]
    loss: Callable[[], Loss]


@dataclass(frozen=True)
class Job:
    """All that one run trains with.

    Attributes:
        plan: What it was built from.
        world: The processes that train.
        engine: What this process does of the training.
        data: Gives batches by step.
        parameters: How many numbers the model has.
    """

    plan: Plan
    world: World
    engine: Engine
    data: Data
    parameters: int


def make_plan(configuration: Configuration, source: object) -> Plan:
    """Find the factories and check all arguments.

    Raises:
        ConfigurationError: Naming every key at fault.
    """
    problems: list[str] = []
    calls: dict[str, Callable[[], Any]] = {}
    for section in ("model", "loss"):
        try:
            calls[section] = _call(getattr(configuration, section), section)
        except FactoryError as error:
            problems += error.problems
    try:
        optimizer_class(configuration.optimizer)
    except FactoryError as error:
        problems += error.problems
    if problems:
        raise ConfigurationError(source, problems)
    return Plan(str(source), configuration, calls["model"], calls["loss"])


def _call(factory: Factory, section: str) -> Callable[[], Any]:
    try:
        function = resolve(factory.factory)
    except FactoryError as error:
        raise FactoryError(f"{section}.factory: {error}") from error
    return partial(function, **checked_arguments(function, factory.arguments, f"{section}.arguments"))


def build_model(plan: Plan) -> nn.Module:
    """The model with its weights at the start, which depend on ``training.seed`` alone.

    Raises:
        ConfigurationError: If the factory fails or gives no module.
    """
    torch.set_num_threads(plan.configuration.pipeline.threads)
    torch.manual_seed(plan.configuration.training.seed)
    model = _built(plan, "model", plan.model)
    if not isinstance(model, nn.Module):
        raise _problem(plan, f"model.factory: gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def build_loss(plan: Plan) -> Loss:
    """The loss; to be called after `build_model`, so that weights of its own follow from the seed too.

    Raises:
        ConfigurationError: If the factory fails or gives nothing that can be called.
    """
    loss = _built(plan, "loss", plan.loss)
    if not callable(loss):
        raise _problem(plan, f"loss.factory: gave a {type(loss).__name__}; expected a callable of (outputs, targets)")
    result: Loss = loss
    return result


def build_run_data(plan: Plan) -> Data:
    """The data set.

    Raises:
        ConfigurationError: If it cannot be read.
    """
    try:
        return build_data(plan.configuration.data, seed=plan.configuration.training.seed)
    except (ValueError, OSError) as error:
        raise _problem(plan, f"data: {error}") from error


def build(plan: Plan, world: World | None = None) -> Job:
    """Build everything; called alike in all processes.

    Args:
        plan: From `make_plan`.
        world: The processes that train; this one alone when not given.

    Raises:
        ConfigurationError: If a factory fails, or the parts do not fit together. Silent: In another process.
    """
    world = world or World()
    start = world.agreed(lambda: _for_ranks(plan, world) if isinstance(world, Ranks) else _for_threads(plan))
    model, loss, data = world.agreed(lambda: _parts(plan))
    size = sum(parameter.numel() for parameter in model.parameters())
    try:
        engine = start(model, loss)
    except FactoryError as error:
        raise ConfigurationError(plan.source, error.problems) from error
    except (ValueError, TypeError, IndexError) as error:
        raise _problem(plan, f"pipeline: {error}") from error
    return Job(plan, world, engine, data, size)


_Start = Callable[[nn.Module, Loss], Engine]


def _for_threads(plan: Plan) -> _Start:
    devices = stage_devices(plan.configuration.pipeline)
    _check_devices(plan, devices)
    return lambda model, loss: ThreadEngine(plan.configuration, model, loss, devices)


def _for_ranks(plan: Plan, world: World) -> _Start:
    try:
        division = divide(plan.configuration.pipeline, world.size)
    except ValueError as error:
        raise _problem(plan, str(error)) from error
    if (name := division.devices[world.rank]) is not None:
        _check_devices(plan, [torch.device(name)])
    return lambda model, loss: RankEngine(plan.configuration, model, loss, division, world)


def _parts(plan: Plan) -> tuple[nn.Module, Loss, Data]:
    model = build_model(plan)
    loss = build_loss(plan)
    data = build_run_data(plan)
    if (rows := plan.configuration.training.batch_size) > data.rows:
        problem = f"training.batch_size: should be at most {data.rows}, the rows of the training data, given {rows}"
        raise _problem(plan, problem)
    if clash := sorted(set(model.state_dict()) & set(loss_state(loss))):
        raise _problem(plan, f"model and loss both have weights named {', '.join(clash)}; rename those of one")
    return model, loss, data


def stage_devices(config: PipelineConfig) -> list[torch.device]:
    """A device for each stage; see ``devices`` in `PipelineConfig`."""
    if isinstance(config.devices, list):
        return [torch.device(name) for name in config.devices]
    if config.devices is not None:
        return [torch.device(config.devices)] * config.stages
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [torch.device("cpu")] * config.stages
    used = min(torch.accelerator.device_count(), config.stages)
    return [torch.device(accelerator.type, stage * used // config.stages) for stage in range(config.stages)]


def _check_devices(plan: Plan, devices: list[torch.device]) -> None:
    for device in devices:
        try:
            torch.zeros(1, device=device)
        except Exception as error:  # each backend raises its own
            first_line = str(error).partition("\n")[0]
            raise _problem(plan, f"pipeline.devices: '{device}' cannot be used here: {first_line}") from error


def _built(plan: Plan, section: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise _problem(plan, f"{section}.factory: {located(error)}") from error


def _problem(plan: Plan, problem: str) -> ConfigurationError:
    return ConfigurationError(plan.source, [problem])
