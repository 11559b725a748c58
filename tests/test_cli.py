import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import gpipe
from gpipe.training.cli import app

ROOT = Path(__file__).parent.parent

# A user's own module. What it does to its own process at a moment of its choice is told by the environment, so that
# the configuration of the run and of its resumption are the same.
OWN_MODULE = """
import os, signal
from gpipe.models.contrastive import ContrastiveLoss

class Loss(ContrastiveLoss):
    calls = 0

    def forward(self, outputs, targets=None):
        self.calls += 1
        if self.calls == int(os.environ.get("AT_STEP", 0)):
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        return super().forward(outputs, targets)

if "AT_SAVE" in os.environ:
    rename = os.rename

    def kill(source, target):
        if target.name == os.environ["AT_SAVE"]:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = kill
"""


def gpipe_command(*arguments: object, cwd: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    """``python -m gpipe`` in a process of its own."""
    own = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, "-m", "gpipe", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **own},
        capture_output=True,
        text=True,
        timeout=120,
    )


def invoke(*arguments: object) -> Result:
    """The same in this process."""
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    result = invoke("train", tiny_run.write(folder))
    assert result.exit_code == 0, result.output
    return folder / "run"


def own_run(folder: Path) -> Path:
    (folder / "own_module.py").write_text(OWN_MODULE)
    return tiny_run.write(folder, loss={"factory": "own_module.Loss"})


@pytest.mark.parametrize(
    ("killed", "step"),
    [({"AT_STEP": 11, "SIGNAL": int(signal.SIGKILL)}, 8), ({"AT_SAVE": "step-000000008"}, 4)],
    ids=["in a step", "while it saves"],
)
def test_a_killed_run_resumes_to_the_same_bits(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, killed: dict[str, Any], step: int
) -> None:
    file = own_run(tmp_path)
    first = gpipe_command("train", file.name, cwd=tmp_path, **killed)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_module", raising=False)
    second = invoke("train", file.name, "--resume")
    assert second.exit_code == 0, second.output
    assert f"resuming {tmp_path / 'run'} at step {step}\n" in second.stdout
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == (finished / "weights.safetensors").read_bytes()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.endswith(".partial")]


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    file = own_run(tmp_path)
    options = ["--set", "optimizer.lr=1e-2"]
    stopped = gpipe_command("train", file.name, *options, cwd=tmp_path, AT_STEP=6, SIGNAL=int(signal.SIGINT))
    assert stopped.returncode == 130
    command = f"gpipe train {file.name} --set optimizer.lr=1e-2 --resume"
    assert stopped.stderr == f"SIGINT: saved and stopped after step 6 of 12. To go on: {command}\n"
    assert (tmp_path / "run" / "saves" / "step-000000006").exists()


def test_a_mistake_is_told_without_a_traceback(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    result = gpipe_command("train", file.name, "--set", "pipeline.stagse=3", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{file.name}: pipeline.stagse: unknown key, given 3; did you mean 'stages'?")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert not (tmp_path / "run").exists()


def test_other_failures_have_their_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("train", tiny_run.write(tmp_path), "--set", "optimizer={name: SGD, lr: 1e30}")
    assert result.exit_code == 1
    assert "step 2: the loss is nan; there is no save yet" in result.stderr

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpipe.training.cli.make_plan", interrupted)
    result = invoke("train", tiny_run.write(tmp_path))
    assert result.exit_code == 130
    assert result.stderr == "stopped at once; what was saved before stays\n"


def test_eval_prints_a_table_and_writes_it(finished: Path, tmp_path: Path) -> None:
    result = invoke("eval", finished, "--batch-size", 100)
    assert result.exit_code == 0, result.output
    scores = json.loads((finished / "eval.json").read_text())
    assert 0 <= scores["zero_shot"]["accuracy"] <= 1
    assert f"{scores['zero_shot']['accuracy']:.4f}" in result.stdout
    assert all(name in result.stdout for name in ("text_to_image", "recall@10", "linear_probe"))
    assert f"written to {finished / 'eval.json'}" in result.stdout


def test_eval_writes_where_it_is_told(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(model: object, data: object, *, batch_size: int) -> dict[str, dict[str, float]]:
        return {"a": {"b": 0.5, "rows": float(batch_size), "threads": float(torch.get_num_threads())}}

    monkeypatch.setattr("gpipe.training.scoring.evaluate", evaluate)
    torch.set_num_threads(before := torch.get_num_threads() + 1)
    try:
        result = invoke("eval", finished, "--json", tmp_path / "new" / "scores.json", "--batch-size", 7)
    finally:
        torch.set_num_threads(before - 1)
    assert result.exit_code == 0, result.output
    assert "0.5000" in result.stdout
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert written == {"a": {"b": 0.5, "rows": 7.0, "threads": float(before)}}


def test_eval_on_a_device_that_is_not_there(finished: Path) -> None:
    result = invoke("eval", finished, "--device", "nowhere")
    assert result.exit_code == 2
    assert result.stderr.startswith("--device: 'nowhere' cannot be used here: ")


def copied(finished: Path, folder: Path, weights: dict[str, torch.Tensor] | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    if weights is not None:
        save_file(weights, folder / "weights.safetensors")
    return folder


def test_eval_of_what_is_no_run(tmp_path: Path) -> None:
    result = invoke("eval", tmp_path / "none")
    assert (result.exit_code, result.stderr) == (2, f"{tmp_path / 'none'}: is no folder\n")
    result = invoke("eval", tmp_path)
    assert result.exit_code == 2
    assert "is no output folder of gpipe train: it has no config.yaml" in result.stderr


def test_eval_of_a_run_that_is_not_finished(finished: Path, tmp_path: Path) -> None:
    result = invoke("eval", copied(finished, tmp_path / "run", None))
    assert result.exit_code == 1
    assert "has no weights.safetensors: the run is not finished" in result.stderr


def test_eval_of_a_run_that_was_to_be_longer_and_was_stopped(tmp_path: Path) -> None:
    file = own_run(tmp_path)
    ended = gpipe_command("train", file.name, "--set", "training.steps=4", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    stopped = gpipe_command("train", file.name, "--resume", cwd=tmp_path, AT_STEP=2, SIGNAL=int(signal.SIGINT))
    assert "stopped after step 6 of 12" in stopped.stderr
    judged = gpipe_command("eval", "run", cwd=tmp_path)
    assert judged.returncode == 1
    assert "has no weights.safetensors: the run is not finished" in judged.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda weights: weights.pop("ln_final.bias"), 'Missing key(s) in state_dict: "ln_final.bias"'),
        (lambda weights: weights.update(surplus=torch.ones(1)), 'Unexpected key(s) in state_dict: "surplus"'),
        (lambda weights: weights.update({"ln_final.bias": torch.ones(3)}), "size mismatch for ln_final.bias"),
        (lambda weights: weights.update({"ln_final.bias": torch.full((8,), float("nan"))}), "cannot be evaluated: "),
    ],
)
def test_eval_of_weights_that_do_not_fit(finished: Path, tmp_path: Path, change: Any, told: str) -> None:
    weights = load_file(finished / "weights.safetensors")
    change(weights)
    result = invoke("eval", copied(finished, tmp_path / "run", weights))
    assert result.exit_code == 1
    assert told in result.stderr
    assert not (tmp_path / "run" / "eval.json").exists()


def test_the_progress_bar_of_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    result = invoke("train", tiny_run.write(tmp_path))
    assert result.exit_code == 0, result.output
    assert "12/12" in result.stdout
    assert "samples/s" in result.stdout
    assert "step 3/12" not in result.stdout


def test_version_and_help() -> None:
    assert invoke("--version").stdout == f"gpipe {gpipe.__version__}\n"
    help_text = invoke("train", "--help").stdout
    assert all(option in help_text for option in ("--set", "--resume", "FILE.yaml"))
    assert invoke("train", "x.yaml", "--ste", "a=b").exit_code == 2


def test_the_library_does_without_the_command_line() -> None:
    """`import gpipe` works with torch and numpy alone."""
    code = "import gpipe, sys; print([m for m in sys.modules if m.startswith(('gpipe.training', 'pydantic', 'yaml'))])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
