"""The command line: ``gpipe train``, ``gpipe simulate``, ``gpipe eval`` and ``gpipe plan``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import gpipe
from gpipe.training import simulating
from gpipe.training.build import make_plan
from gpipe.training.errors import ConfigurationError, Silent, UserError
from gpipe.training.logs import tell
from gpipe.training.loop import train as train_plan
from gpipe.training.plan import plan_pipeline
from gpipe.training.plan_report import as_json, report
from gpipe.training.reading import read_configuration
from gpipe.training.scoring import Scores, score
from gpipe.training.simulating import simulate_pipeline
from gpipe.training.world import joined, started_by_torchrun

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Exact pipeline-parallel training from a YAML file.",
)


def main() -> None:
    """The console script ``gpipe``."""
    app(prog_name="gpipe")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gpipe {gpipe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The configuration.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. pipeline.stages=4. May be repeated."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder, to the same bits.")
    ] = False,
) -> None:
    """Train what FILE.yaml describes and write everything to its output folder."""
    with _told(), joined(Console(stderr=True)) as world:
        plan = world.agreed(lambda: make_plan(read_configuration(file, overrides or []), file))
        command = _resume_command(file, overrides or [])
        train_plan(plan, Console(), world=world, resume=resume, resume_command=command)


@app.command(name="eval")
def evaluate_run(
    folder: Annotated[Path, typer.Argument(metavar="RUN_FOLDER", help="The output folder of gpipe train.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows evaluated at a time.")] = 256,
    device: Annotated[
        str | None, typer.Option(help="Where the model runs.  [default: the accelerator, if there is one, or cpu]")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="PATH", help="Where to write the scores.  [default: RUN_FOLDER/eval.json]"),
    ] = None,
) -> None:
    """Evaluate the weights of a finished run."""
    with _told(), _alone("gpipe eval"):
        console = Console()
        scores, written = score(folder, batch_size=batch_size, device=device, json_file=json_file)
        console.print(_table(scores))
        tell(console, f"written to {written}")


@app.command(name="simulate")
def simulate_schedules(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The configuration.")],
    schedule: Annotated[
        list[str] | None, typer.Option(help="A schedule by name. May be repeated.  [default: all there are]")
    ] = None,
    stages: Annotated[int | None, typer.Option(min=1, help="Number of stages.  [default: pipeline.stages]")] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Micro-batches.  [default: pipeline.chunks]")] = None,
    devices: Annotated[
        str | None,
        typer.Option(metavar="8xH100|FILE.yaml", help="Devices; costs are then estimated.  [default: measured here]"),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key. May be repeated.")
    ] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Predict a step of what FILE.yaml trains under every schedule, without training."""
    with _told(), _alone("gpipe simulate"):
        errors = Console(stderr=True)
        simulation = simulate_pipeline(
            make_plan(read_configuration(file, overrides or []), file),
            names=schedule or [],
            stages=stages,
            chunks=chunks,
            devices=devices,
            say=lambda line: tell(errors, line),
        )
        if print_json:
            typer.echo(json.dumps(simulating.as_json(simulation), indent=2, allow_nan=False))
        else:
            simulating.report(simulation, Console())


@app.command(name="plan")
def plan_devices(
    file: Annotated[Path, typer.Argument(metavar="FILE.yaml", help="The configuration.")],
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="8xH100|FILE.yaml",
            help="Devices to plan for; costs are then estimated.  [default: those here; costs are measured]",
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What every device may hold, e.g. 80GiB.  [default: all it has]")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a key, e.g. training.batch_size=512. May be repeated."
        ),
    ] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print everything that was found, as JSON.")] = False,
) -> None:
    """Find the best stages, chunks and checkpoint for what FILE.yaml trains."""
    with _told(), _alone("gpipe plan"):
        errors = Console(stderr=True)
        plan = make_plan(read_configuration(file, overrides or []), file)
        planning = plan_pipeline(plan, devices=devices, memory=memory, tell=lambda line: tell(errors, line))
        if print_json:
            typer.echo(json.dumps(as_json(planning), indent=2, allow_nan=False))
        else:
            report(planning, Console())


@contextmanager
def _told() -> Iterator[None]:
    """Tell a user's error in a few words on the error stream, and leave with its exit code."""
    errors = Console(stderr=True)
    try:
        yield
    except Silent as error:
        raise typer.Exit(error.exit_code) from None
    except UserError as error:
        tell(errors, str(error))
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        tell(errors, "stopped at once; what was saved before stays")
        raise typer.Exit(130) from None


@contextmanager
def _alone(command: str) -> Iterator[None]:
    """Refuse to do the same on every rank."""
    if started_by_torchrun():
        with joined(Console(stderr=True)) as world:
            if world.size > 1:
                problem = f"torchrun started {world.size} processes, but this takes one: start it without torchrun"
                raise ConfigurationError(command, [problem])
    yield


def _resume_command(file: Path, overrides: Sequence[str]) -> str:
    if started_by_torchrun():
        return "the same command with --resume"
    options = [word for override in overrides for word in ("--set", override)]
    return shlex.join(["gpipe", "train", str(file), *options, "--resume"])


def _table(scores: Scores) -> Table:
    table = Table("task", "measure")
    table.add_column("score", justify="right")
    for task, measures in scores.items():
        for i, (measure, value) in enumerate(measures.items()):
            table.add_row(task if i == 0 else "", measure, _number(value), end_section=i == len(measures) - 1)
    return table


def _number(value: float) -> str:
    """A share with four decimals, a count with none."""
    return f"{value:.0f}" if value > 1 and value.is_integer() else f"{value:.4f}"
