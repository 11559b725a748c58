"""A training run of seconds: a tiny CLIP with dropout on the digits, as `examples/clip_digits.yaml` but shrunken."""

import copy
import io
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from gpipe.training.build import make_plan
from gpipe.training.loop import train
from gpipe.training.reading import read_configuration

TINY: dict[str, Any] = {
    "model": {
        "factory": "gpipe.models.clip.clip",
        "arguments": {
            "image_size": 8,
            "patch_size": 4,
            "in_channels": 1,
            "vision_width": 8,
            "vision_layers": 2,
            "vision_heads": 2,
            "text_width": 8,
            "text_layers": 1,
            "text_heads": 2,
            "embed_dim": 8,
            "activation": "quick_gelu",
            "context_length": 16,
            "vocabulary_size": 64,
            "dropout": 0.1,
        },
    },
    "loss": {"factory": "gpipe.models.contrastive.ContrastiveLoss"},
    "data": {"name": "digits"},
    "pipeline": {"stages": 2, "chunks": 3},
    "optimizer": {"name": "AdamW", "lr": 0.01, "weight_decay": 0.2},
    "training": {
        "steps": 12,
        "batch_size": 8,
        "seed": 5,
        "save_every": 4,
        "schedule": {"name": "cosine", "warmup_steps": 3},
    },
    "logging": {"every": 3},
    "output": "run",
}


def write(folder: Path, *, name: str = "tiny.yaml", **sections: Any) -> Path:
    """The file of a tiny run; a section given replaces that of `TINY`, and the output goes below ``folder``."""
    values = copy.deepcopy(TINY) | {"output": str(folder / "run")} | sections
    file = folder / name
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def run(file: Path, *overrides: str, resume: bool = False) -> str:
    """Train in this process; returns what was printed."""
    printed = io.StringIO()
    console = Console(file=printed, width=200)
    train(make_plan(read_configuration(file, overrides), file), console, resume=resume)
    return printed.getvalue()
