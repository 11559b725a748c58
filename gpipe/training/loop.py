"""The training loop: steps, saves, and an end in good order."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

from rich.console import Console

from gpipe.training.build import Job, Plan, build
from gpipe.training.checking import NonFiniteError
from gpipe.training.config import Configuration, DecaySchedule
from gpipe.training.errors import Interrupted, RunError
from gpipe.training.folder import RunFolder
from gpipe.training.logs import Logs, tell
from gpipe.training.saving import write_weights
from gpipe.training.signals import StopRequest
from gpipe.training.trainer import StepResult, Trainer, written_with
from gpipe.training.world import World


def train(
    plan: Plan,
    console: Console,
    *,
    world: World | None = None,
    resume: bool = False,
    resume_command: str = "the same command with --resume",
) -> Path:
    """Train what a plan describes; return the file of the weights. Called alike in all processes.

    Args:
        plan: From `make_plan`.
        console: Where progress goes, in the process that leads.
        world: The processes that train; this one alone when not given.
        resume: Go on with the run in the output folder, if there is one.
        resume_command: What to type to go on with this run, for messages.

    Raises:
        ConfigurationError: If the parts do not fit together, or the output folder is another run's.
        RunError: If the run cannot go on; the newest save is good.
        Interrupted: If a signal asked to stop, after a save.
        Silent, OtherRankFailed: If another process failed.
    """
    world = world or World()
    folder = RunFolder(plan.configuration.output)
    try:
        return _train(plan, console, world, folder, resume, resume_command)
    finally:
        folder.release()


def _train(plan: Plan, console: Console, world: World, folder: RunFolder, resume: bool, resume_command: str) -> Path:
    restarted = world.job if world.restarted else None
    before = world.led(lambda: folder.check(plan.configuration, plan.source, resume, restarted))
    job = build(plan, world)
    world.led(lambda: folder.check_data(job.data, plan.source))
    say = partial(tell, console) if world.leads else _say_nothing
    say(_described(job))
    trainer = Trainer(job, folder.saves)
    if resume or before is not None:
        _resume(job, trainer, folder, before, say)
    began, start = time.monotonic(), trainer.step
    try:
        result = _run(job, trainer, folder, console, resume_command)
    except NonFiniteError as error:
        raise _advised(error, folder) from error
    weights = world.whole(job.engine.weights())
    world.led(lambda: write_weights(folder.weights, weights))
    _report(say, folder, trainer.step - start, time.monotonic() - began, result)
    return folder.weights


def _say_nothing(line: str) -> None:
    pass


def _described(job: Job) -> str:
    configuration = job.plan.configuration
    training = configuration.training
    return (
        f"{configuration.model.factory}: {job.parameters:,} parameters; cells per stage: {job.engine.described()}; "
        f"{training.steps} steps of {training.batch_size} rows in {configuration.pipeline.chunks} micro-batches"
    )


def _resume(
    job: Job, trainer: Trainer, folder: RunFolder, before: Configuration | None, say: Callable[[str], None]
) -> None:
    """Bring the trainer to where the run in the output folder was, and say what is not as it was."""
    then = trainer.load(warn=lambda message: say(f"warning: {message}"))
    if then is None or before is None:
        say(f"{folder.path} holds no save to resume: starting at step 0")
        return
    say(f"resuming {folder.path} at step {trainer.step}")
    for thing, now in written_with(job).items():
        if then.get(thing) != now:
            say(f"warning: {thing} is {now} now and was {then.get(thing)}: the last bits of the results may differ")
    training = job.plan.configuration.training
    decays_to_the_end = isinstance(training.schedule, DecaySchedule) and training.schedule.decay_steps is None
    if decays_to_the_end and training.steps != before.training.steps:
        say(
            f"warning: training.steps was {before.training.steps} and is {training.steps}: the learning rate goes on "
            "as in the longer run, which would have had others up to here"
        )


def _run(job: Job, trainer: Trainer, folder: RunFolder, console: Console, resume_command: str) -> StepResult | None:
    """All steps that are left; returns what the last one gave."""
    configuration, engine, world = job.plan.configuration, job.engine, job.world
    training = configuration.training
    result, stopped_by = None, None
    logs = Logs(
        folder.path,
        console,
        steps=training.steps,
        start=trainer.step,
        every=configuration.logging.every,
        batch_size=training.batch_size,
        shown=world.leads,
    )
    with StopRequest() as stop, logs:
        while trainer.step < training.steps and stopped_by is None:
            result = trainer.train_step()
            if world.leads:  # after a step: what fails at the first leaves no run behind
                folder.claim(configuration, job.plan.source, world.job)
            logs.step(trainer.step, result.loss)
            if logs.due(trainer.step):
                timeline = engine.timeline()
                logs.point(trainer.step, result, timeline.busy, engine.peak_bytes())
                if trainer.step == training.steps:
                    logs.timeline(trainer.step, timeline)
            stopped_by = world.stop(stop.received)
            if stopped_by or trainer.step % training.save_every == 0 or trainer.step == training.steps:
                trainer.save()
                logs.flush()
    if stopped_by is not None and trainer.step < training.steps:
        done = f"{stopped_by.name}: saved and stopped after step {trainer.step} of {training.steps}"
        raise Interrupted(f"{done}. To go on: {resume_command}", stopped_by)
    return result


def _advised(error: NonFiniteError, folder: RunFolder) -> RunError:
    newest = max(folder.saves.glob("step-*"), default=None)
    kept = f"the newest save, {newest}, is from before" if newest else "there is no save yet"
    return RunError(
        f"{error}; {kept}. Resuming would end the same way. Start a new run with a lower optimizer.lr, a longer "
        "training.schedule.warmup_steps or training.clip_gradient_norm (1.0, say), or look for values in the data "
        "that are not finite."
    )


def _report(
    say: Callable[[str], None], folder: RunFolder, steps: int, seconds: float, result: StepResult | None
) -> None:
    if result is None:
        say("all steps were done already")
    else:
        say(f"trained {steps} steps in {timedelta(seconds=round(seconds))}; loss {result.loss:.4f}")
    where = shlex.quote(str(folder.path))
    say(f"weights   {folder.weights}")
    say(f"scalars   tensorboard --logdir {where}")
    say(f"timeline  {folder.timeline} (https://ui.perfetto.dev opens it)")
    say(f"evaluate  gpipe eval {where}")
