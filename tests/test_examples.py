import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from gpipe.training.build import make_plan
from gpipe.training.optimizer import optimizer_class
from gpipe.training.reading import read_configuration

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
RECIPE = ROOT / "examples" / "clip_vit_b32.yaml"  # for accelerators
CONFIGURATIONS = sorted(set((ROOT / "examples").glob("*.yaml")) - {RECIPE})
OFTEN = ("wrap_your_model.py", "clip_digits.yaml")


def often_or_rarely(files):
    """Parameters: of the files, a script and a configuration run every time, the others as rare tests."""
    return [pytest.param(f, marks=() if f.name in OFTEN else pytest.mark.rare, id=f.name) for f in files]


def run(*arguments, cwd):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", often_or_rarely(SCRIPTS))
def test_script_runs(script, tmp_path):
    assert run(script, cwd=tmp_path).strip()


@pytest.mark.rare
def test_ranks_print_what_one_process_does_and_any_number_goes_on(tmp_path):
    torchrun = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    script = ROOT / "examples" / "distributed.py"
    alone = run(script, "one", cwd=tmp_path)
    assert run(*torchrun, 2, script, "two", cwd=tmp_path) == alone
    shutil.rmtree(tmp_path / "two" / "step-000000060")
    (tmp_path / "two" / "latest").write_text("step-000000040")
    assert run(script, "two", cwd=tmp_path) == alone.splitlines(keepends=True)[-1]


@pytest.mark.parametrize("configuration", often_or_rarely(CONFIGURATIONS))
def test_configuration_trains_for_a_few_steps(configuration, tmp_path):
    shortened = ("training.steps=3", "training.batch_size=32", "training.schedule.warmup_steps=1", "output=run")
    options = [word for setting in shortened for word in ("--set", setting)]
    told = run("-m", "gpipe", "train", configuration, *options, cwd=tmp_path)
    assert "trained 3 steps" in told
    assert (tmp_path / "run" / "weights.safetensors").stat().st_size > 100_000


def captioned_images(folder, rows):
    """The data that the recipe asks for, made up."""
    (folder / "data").mkdir()
    lines = ["image,caption"]
    for row in range(rows):
        colour = (40 * row % 256, 90 * row % 256, 170 * row % 256)
        Image.new("RGB", (40 + row, 36), colour).save(folder / "data" / f"{row}.png")
        lines.append(f"{row}.png,a plain picture number {row}")
    (folder / "data" / "pairs.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.rare
def test_the_published_recipe_trains_when_shrunken(tmp_path):
    captioned_images(tmp_path, 20)
    smaller = {"image_size": 64, "vision_width": 32, "vision_heads": 2, "text_width": 32, "text_heads": 2}
    shrunken = [f"model.arguments.{name}={value}" for name, value in (smaller | {"embed_dim": 16}).items()]
    shrunken += ["data.image_size=64", "pipeline.devices=cpu", "pipeline.chunks=4", "loss.arguments.chunk=5"]
    shrunken += ["training.steps=3", "training.batch_size=16", "training.schedule.warmup_steps=1", "output=run"]
    options = [word for setting in shrunken for word in ("--set", setting)]
    told = run("-m", "gpipe", "train", RECIPE, *options, cwd=tmp_path)
    assert "cells per stage: 6 on cpu, 5 on cpu, 8 on cpu, 9 on cpu; 3 steps of 16 rows in 4 micro-batches" in told
    assert "trained 3 steps" in told
    scores = run("-m", "gpipe", "eval", "run", cwd=tmp_path)
    assert "image_to_text" in scores


def test_the_published_recipe_is_as_published():
    configuration = read_configuration(RECIPE)
    plan = make_plan(configuration, RECIPE)
    with torch.device("meta"):
        model, loss = plan.model(), plan.loss()
    assert sum(p.numel() for module in (model, loss) for p in module.parameters()) == 151_277_313
    assert sum(configuration.pipeline.balance) == len(model.cells())
    optimizer, arguments = optimizer_class(configuration.optimizer)
    assert optimizer is torch.optim.AdamW
    assert arguments == {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
    assert configuration.optimizer.decay_matrices_only
    training = configuration.training
    assert (training.batch_size, training.schedule.name, training.schedule.warmup_steps) == (32768, "cosine", 2000)
    assert training.steps == 32 * 400_000_000 // 32768
