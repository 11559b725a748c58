"""What a configuration file holds: the sections, their keys, types, ranges and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from gpipe.schedules import builder
from gpipe.training.data import DataConfig

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A mapping of the file; keys it does not name are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Factory(Section):
    """A callable by its dotted path, and what it is called with.

    Attributes:
        factory: e.g. ``gpipe.models.clip.clip``; a module in the current directory will do as well.
        arguments: keyword arguments, checked against the callable's signature.
    """

    factory: str
    arguments: dict[str, JsonValue] = Field(default_factory=dict)


class PipelineConfig(Section):
    """How the model is cut and run. Stages, balance, devices and checkpoint do not change the results.

    Attributes:
        stages: number of stages. Under torchrun the number of ranks decides.
        balance: cells per stage; by parameter count when not given.
        devices: one device for all stages or a list of one per stage. When not given: the accelerators of the machine,
            each with an equal share of the stages; the CPU where there are none.
        chunks: micro-batches of a mini-batch.
        checkpoint: which micro-batches re-materialise their activations; a number keeps those of the last so
            many, a list of numbers says so for each stage.
        schedule: in which order the stages work.
        loss_over: ``micro_batch`` computes the loss of every micro-batch by itself and takes their mean, weighted by
            rows: the same for a mean over rows, not for a contrastive loss. Schedules that interleave forward and
            backward need it.
        threads: intra-op threads of each stage on the CPU, and of the main thread.
        deferred_batch_norm: batch-norm statistics once per mini-batch.
    """

    stages: PositiveInt = 1
    balance: list[PositiveInt] | None = None
    devices: list[str] | str | None = None
    chunks: PositiveInt = 1
    checkpoint: Literal["always", "except_last", "never"] | NonNegativeInt | list[NonNegativeInt] = "except_last"
    schedule: str = "gpipe"
    loss_over: Literal["mini_batch", "micro_batch"] = "mini_batch"
    threads: PositiveInt = 1
    deferred_batch_norm: bool = False

    @field_validator("schedule")
    @classmethod
    def _is_known(cls, schedule: str) -> str:
        builder(schedule)
        return schedule

    @field_validator("devices")
    @classmethod
    def _are_devices(cls, devices: list[str] | str | None) -> list[str] | str | None:
        for name in [devices] if isinstance(devices, str) else devices or []:
            try:
                device = torch.device(name)
            except RuntimeError as error:
                raise ValueError(f"{name!r} is no device of torch, such as 'cpu' or 'cuda:0'") from error
            if device.type == "meta":
                raise ValueError("'meta' holds no values to train; give 'cpu' or an accelerator, such as 'cuda:0'")
        return devices

    @model_validator(mode="after")
    def _fit_loss(self) -> Self:
        if self.loss_over == "mini_batch" and self.schedule not in ("gpipe", "gpipe_zero_bubble"):
            raise ValueError(
                f"schedule {self.schedule!r} interleaves forward and backward; it needs loss_over: micro_batch, which "
                "suits losses that are means over rows"
            )
        return self

    @model_validator(mode="after")
    def _fit_stages(self) -> Self:
        for key in ("balance", "devices", "checkpoint"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != self.stages:
                raise ValueError(
                    f"{key} has {len(value)} entries but stages is {self.stages}; give one entry per stage, or set both"
                )
        return self


class OptimizerConfig(BaseModel):
    """An optimizer of ``torch.optim``; all other keys are its own arguments (``lr``, ``betas``, ...).

    Attributes:
        name: class name, e.g. ``AdamW``.
        decay_matrices_only: weight decay on parameters with at least two dimensions only: not on gains, biases and
            scalars. ``false`` decays every parameter, as ``torch.optim`` does.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    decay_matrices_only: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the optimizer's class, as given."""
        return dict(self.model_extra or {})


class ConstantSchedule(Section):
    """A rising line over ``warmup_steps``, then the full learning rate."""

    name: Literal["constant"] = "constant"
    warmup_steps: NonNegativeInt = 0


class DecaySchedule(Section):
    """A rising line over ``warmup_steps``, then down to a share of the full rate.

    Attributes:
        name: the shape of the way down.
        warmup_steps: steps of the rising line.
        decay_steps: the step at which the way down ends; ``training.steps`` when not given.
        final_share: share of the full learning rate at its end.
    """

    name: Literal["linear", "cosine"]
    warmup_steps: NonNegativeInt = 0
    decay_steps: PositiveInt | None = None
    final_share: Share = 0.0

    @model_validator(mode="after")
    def _goes_down_after_it_rose(self) -> Self:
        if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"decay_steps is {self.decay_steps} but warmup_steps is {self.warmup_steps}; the way down ends at step "
                "decay_steps, so give a larger one, or leave it out"
            )
        return self


Schedule = Annotated[ConstantSchedule | DecaySchedule, Field(discriminator="name")]


class TrainingConfig(Section):
    """How long and how to train.

    Attributes:
        steps: optimizer steps, one mini-batch each.
        batch_size: rows of a mini-batch.
        precision: ``bfloat16`` runs forward and loss under autocast; parameters stay float32.
        seed: the weights at the start, the batches and every random draw follow from it.
        schedule: the learning rate over the steps.
        save_every: steps between two saves; there is always one at the end.
        clip_gradient_norm: largest norm of all gradients together; no clipping when not given.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    schedule: Schedule = ConstantSchedule()
    save_every: PositiveInt = 100
    clip_gradient_norm: PositiveFloat | None = None


class LoggingConfig(Section):
    """What is told on the way.

    Attributes:
        every: steps between two points in TensorBoard, and between two lines where the output is not a terminal.
    """

    every: PositiveInt = 10


class Configuration(Section):
    """A whole file.

    Attributes:
        model: an ``nn.Sequential``, or a module with ``cells()``.
        loss: a callable of (outputs, targets) that gives a scalar; parameters of its own are trained too, and its
            ``clamp_()``, if it has one, is called after every step.
        data: a data set by name.
        pipeline: stages, devices, micro-batches.
        optimizer: a class of ``torch.optim``.
        training: steps, batch size, precision, seed, learning-rate schedule, saves.
        logging: how often.
        output: the folder everything is written to; relative to the current directory.
    """

    model: Factory
    loss: Factory
    data: DataConfig
    pipeline: PipelineConfig = PipelineConfig()
    optimizer: OptimizerConfig
    training: TrainingConfig
    logging: LoggingConfig = LoggingConfig()
    output: Path
