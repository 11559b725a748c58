import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
CONFIGURATIONS = sorted((ROOT / "examples").glob("*.yaml"))


def run(*arguments, cwd):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_script_runs(script, tmp_path):
    assert run(script, cwd=tmp_path).strip()


def test_ranks_print_what_one_process_does_and_any_number_goes_on(tmp_path):
    torchrun = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    script = ROOT / "examples" / "distributed.py"
    alone = run(script, "one", cwd=tmp_path)
    assert run(*torchrun, 2, script, "two", cwd=tmp_path) == alone
    shutil.rmtree(tmp_path / "two" / "step-000000060")
    (tmp_path / "two" / "latest").write_text("step-000000040")
    assert run(script, "two", cwd=tmp_path) == alone.splitlines(keepends=True)[-1]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda p: p.name)
def test_configuration_trains_for_a_few_steps(configuration, tmp_path):
    shortened = ("training.steps=3", "training.batch_size=32", "training.schedule.warmup_steps=1", "output=run")
    options = [word for setting in shortened for word in ("--set", setting)]
    told = run("-m", "gpipe", "train", configuration, *options, cwd=tmp_path)
    assert "trained 3 steps" in told
    assert (tmp_path / "run" / "weights.safetensors").stat().st_size > 100_000
