"""`gpipe train` under torchrun: what only processes that really die can show."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

ROOT = Path(__file__).parent.parent
KILLS = 5

# A user's own model: CLIP between two cells, of which every rank has one. They do what the environment asks for; a kill
# comes some time after the call that is drawn, whatever the rank does then. A step has five calls.
OWN_MODULE = """
import atexit, os, random, signal, threading, time
from torch import nn
from gpipe.models.clip import clip

ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
RANK = int(os.environ.get("RANK", 0))

class Watch(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if "BOOM" in os.environ and RANK == 1 and self.calls == 6:
            atexit.register(time.sleep, 2.0)  # leaves after those that only hear of it
            raise ValueError("boom")
        if "SEED" in os.environ and ATTEMPT < int(os.environ["KILLS"]):
            draw = random.Random(f"{os.environ['SEED']} {ATTEMPT}")
            rank, call, seconds = draw.randrange(2), draw.randrange(60), draw.uniform(0.0, 0.1)
            if (rank, call) == (RANK, self.calls):
                threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        self.calls += 1
        return x

class Watched(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.clip = clip(**arguments)
        self.watches = nn.ModuleList([Watch(), Watch()])

    def cells(self):
        return [self.watches[0], *self.clip.cells(), self.watches[1]]

def model(**arguments):
    return Watched(**arguments)
"""


def torchrun(folder, *arguments, restarts=0, **environment):
    """``torchrun --nproc-per-node 2 -m gpipe``."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    own = {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, "--max-restarts", str(restarts), "-m", "gpipe", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **own, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture
def file(tmp_path):
    (tmp_path / "watched_model.py").write_text(OWN_MODULE)
    arguments = tiny_run.TINY["model"]["arguments"]
    return tiny_run.write(tmp_path, model={"factory": "watched_model.model", "arguments": arguments})


def test_what_a_cell_raises_is_told_once(tmp_path, file):
    result = torchrun(tmp_path, "train", file, BOOM="1")
    assert result.returncode == 1
    assert result.stderr.count("ValueError: boom") == 1
    assert "rank 1, stage 1: Traceback (most recent call last):" in result.stderr
    assert re.search(r"raised in stage 1 \(.*\), cell 8 \(Watch\), micro-batch 1, action 1F1\n", result.stderr)
    assert "OtherRankFailed" not in result.stderr
    assert re.search(r"Root Cause.*\n.*\n.*\n.*\n *rank *: 1 ", result.stderr), "torchrun names the rank that failed"
    assert "traceback : rank 1, stage 1: told why above" in result.stderr
    assert list((tmp_path / "run").glob("*.safetensors")) == []


@pytest.mark.rare
def test_killed_at_random_moments_a_run_comes_to_the_same_bits(tmp_path, file, monkeypatch):
    steps = ["training.steps=80", "training.save_every=3"]
    seed = random.SystemRandom().randrange(10**6)
    given = [word for override in steps for word in ("--set", override)]
    result = torchrun(tmp_path, "train", file, *given, restarts=KILLS, SEED=seed, KILLS=KILLS)
    told = f"SEED={seed}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == 0, told
    assert result.stderr.count(f"(exitcode: -{int(signal.SIGKILL)})") == KILLS, told
    monkeypatch.syspath_prepend(tmp_path)
    tiny_run.run(file, *steps, f"output={tmp_path / 'whole'}")
    ranks, whole = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("run", "whole"))
    assert ranks == whole, told
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".partial")], told
