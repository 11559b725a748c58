"""``gpipe eval``: the weights of a finished run, and how they do on the data kept out of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from gpipe.training.build import build_loss, build_model, build_run_data, make_plan
from gpipe.training.checking import loss_state
from gpipe.training.errors import ConfigurationError, RunError
from gpipe.training.evaluate import evaluate
from gpipe.training.folder import RunFolder
from gpipe.training.reading import read_configuration
from gpipe.training.saving import read_weights, write_text

Scores = dict[str, dict[str, float]]


def score(
    path: Path, *, batch_size: int = 256, device: str | None = None, json_file: Path | None = None
) -> tuple[Scores, Path]:
    """Evaluate the run in a folder and write its scores beside its weights.

    Args:
        path: The output folder of ``gpipe train``.
        batch_size: Rows evaluated at a time.
        device: Where the model runs; the accelerator when not given, or the CPU where there is none.
        json_file: Where to write the scores; ``eval.json`` in the folder when not given.

    Returns:
        the scores by task and measure, and the file they were written to.

    Raises:
        ConfigurationError: If the folder is no run's, its configuration cannot be built here, or the training data
            have changed since.
        RunError: If there are no weights, they do not fit, or the data cannot be evaluated.
    """
    folder = RunFolder(path)
    if not folder.configuration.is_file():
        what = "is no output folder of gpipe train: it has no config.yaml" if path.is_dir() else "is no folder"
        raise ConfigurationError(path, [what])
    if not folder.weights.is_file():
        raise RunError(
            f"{folder.path} has no weights.safetensors: the run is not finished; go on with gpipe train --resume"
        )
    plan = make_plan(read_configuration(folder.configuration), folder.configuration)
    threads = torch.get_num_threads()
    model, loss = build_model(plan), build_loss(plan)
    torch.set_num_threads(threads)  # nothing is trained here: all cores may help
    _load(model, set(loss_state(loss)), read_weights(folder.weights), folder.weights)
    _move(model, device)
    try:
        data = build_run_data(plan)
        folder.check_data(data, folder.configuration)
        scores = evaluate(model, data, batch_size=batch_size)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RunError(f"{path} cannot be evaluated: {error}") from error
    target = json_file or folder.scores
    write_text(target, json.dumps(scores, indent=2) + "\n")
    return scores, target


def _move(model: nn.Module, device: str | None) -> None:
    place = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        model.to(place)
    except Exception as error:  # each backend raises its own
        first_line = str(error).partition("\n")[0]
        raise ConfigurationError("--device", [f"{place!r} cannot be used here: {first_line}"]) from error


def _load(model: nn.Module, loss_names: set[str], weights: dict[str, Tensor], file: Path) -> None:
    """Load strictly: every weight of the model, and none besides but the loss's own."""
    own = {name: weight for name, weight in weights.items() if name not in loss_names}
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise RunError(f"{file} does not fit the model of its config.yaml: {error}") from error
