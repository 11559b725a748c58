import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_run
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import gpipe
from gpipe.models.contrastive import ContrastiveLoss
from gpipe.training.build import build, make_plan
from gpipe.training.errors import ConfigurationError, Interrupted, RunError
from gpipe.training.reading import read_configuration
from gpipe.training.saving import read_weights
from gpipe.training.trainer import Trainer

MODULE = "users_own_module"
OWN_LOSS = {"factory": f"{MODULE}.build"}


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Leave the process as it was; and have SIGINT do what it does in a foreground job, wherever the tests run."""
    threads, handler = torch.get_num_threads(), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], dict[str, str]]:
    """Make a factory of a test's own reachable by a dotted path; gives the section of the file."""

    def install(build: object) -> dict[str, str]:
        module = ModuleType(MODULE)
        module.build = build  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, MODULE, module)
        return OWN_LOSS

    return install


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


def at_call(number: int, then: Callable[[], object]) -> Callable[[], nn.Module]:
    """A contrastive loss that does something else besides, on one of its calls."""

    class Loss(ContrastiveLoss):
        calls = 0

        def forward(self, outputs: tuple[Tensor, Tensor], targets: object = None) -> Tensor:
            self.calls += 1
            loss = super().forward(outputs, targets)
            extra = then() if self.calls == number else None
            return loss * extra if isinstance(extra, Tensor) else loss

    return Loss


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny_run.run(tiny_run.write(folder))
    return weights(folder / "run")


def test_what_a_run_leaves(tmp_path: Path) -> None:
    printed = tiny_run.run(tiny_run.write(tmp_path))
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out")}
    assert names == {".lock", "config.yaml", "data.txt", "saves", "timeline.json", "weights.safetensors"}
    saves = sorted(path.name for path in (folder / "saves").iterdir())
    assert saves == ["latest", "step-000000008", "step-000000012"]
    found = read_weights(folder / "weights.safetensors")
    assert "logit_scale" in found
    assert "visual.conv1.weight" in found
    lines = printed.splitlines()
    told = r".*clip: [\d,]+ parameters; cells per stage: \d on cpu, \d on cpu; 12 steps of 8 rows in 3 micro-batches"
    assert re.fullmatch(told, lines[0])
    assert [line.split()[1] for line in lines[1:5]] == ["3/12", "6/12", "9/12", "12/12"]
    assert "samples/s" in lines[1]
    assert lines[4].endswith("  0:00:00 left")
    assert f"weights   {folder / 'weights.safetensors'}" in lines
    assert f"evaluate  gpipe eval {folder}" in lines


@pytest.mark.parametrize(
    "overrides",
    [
        ["pipeline.stages=1"],
        ["pipeline.stages=4", "pipeline.checkpoint=always"],
        ["pipeline.balance=[1, 6]", "pipeline.checkpoint=never"],
        ["pipeline.stages=3", "pipeline.devices=cpu", "logging.every=1", "training.save_every=1"],
    ],
)
def test_stages_change_no_bit(tmp_path: Path, uninterrupted: bytes, overrides: list[str]) -> None:
    tiny_run.run(tiny_run.write(tmp_path), *overrides)
    assert weights(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize(
    "override",
    ["training.seed=6", "pipeline.chunks=2", "training.clip_gradient_norm=0.1", "training.precision=bfloat16"],
)
def test_settings_that_do_change_bits(tmp_path: Path, uninterrupted: bytes, override: str) -> None:
    tiny_run.run(tiny_run.write(tmp_path), override)
    assert weights(tmp_path / "run") != uninterrupted
    assert all(w.dtype == torch.float32 for w in read_weights(tmp_path / "run" / "weights.safetensors").values())


def test_every_stage_gets_its_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPipe divides the threads it finds among its workers; the main thread has as many whatever the stages."""
    found: list[int] = []

    class Watched(gpipe.GPipe):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            found.append(torch.get_num_threads())
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(gpipe, "GPipe", Watched)
    file = tiny_run.write(tmp_path)
    build(make_plan(read_configuration(file, ["pipeline.stages=3", "pipeline.threads=2"]), file))
    assert found == [6]
    assert torch.get_num_threads() == 2


def test_low_precision_is_the_same_for_every_number_of_stages(tmp_path: Path) -> None:
    for name, stages in (("a", 1), ("b", 4)):
        output = f"output={tmp_path / name}"
        tiny_run.run(tiny_run.write(tmp_path), "training.precision=bfloat16", f"pipeline.stages={stages}", output)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_what_the_callers_generator_did_before_is_no_matter(tmp_path: Path, uninterrupted: bytes) -> None:
    torch.manual_seed(99)
    torch.rand(3)
    tiny_run.run(tiny_run.write(tmp_path))
    assert weights(tmp_path / "run") == uninterrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_gives_the_same_bits(
    tmp_path: Path, own: Callable[[object], dict[str, str]], uninterrupted: bytes, number: signal.Signals
) -> None:
    file = tiny_run.write(tmp_path, loss=own(at_call(5, lambda: signal.raise_signal(number))))
    with pytest.raises(Interrupted, match=rf"^{number.name}: saved and stopped after step 5 of 12. To go on: ") as stop:
        tiny_run.run(file)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    own(ContrastiveLoss)
    printed = tiny_run.run(file, "pipeline.stages=3", "pipeline.checkpoint=never", "logging.every=1", resume=True)
    assert f"resuming {tmp_path / 'run'} at step 5" in printed
    assert "warning" not in printed
    assert weights(tmp_path / "run") == uninterrupted


def test_a_second_signal_stops_at_once(tmp_path: Path, own: Callable[[object], dict[str, str]]) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    file = tiny_run.write(tmp_path, loss=own(at_call(2, twice)))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        tiny_run.run(file)
    assert not (tmp_path / "run" / "saves").exists()


def test_a_loss_that_draws_resumes_to_the_same_bits(tmp_path: Path, own: Callable[[object], dict[str, str]]) -> None:
    class Noisy(ContrastiveLoss):
        def forward(self, outputs: tuple[Tensor, Tensor], targets: object = None) -> Tensor:
            return super().forward(outputs, targets) * torch.rand(())

    file = tiny_run.write(tmp_path, loss=own(Noisy))
    constant = "training.schedule={name: constant}"
    tiny_run.run(file, constant, "training.steps=4")
    tiny_run.run(file, constant, "training.steps=8", resume=True)
    tiny_run.run(file, constant, "training.steps=8", f"output={tmp_path / 'whole'}")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_a_damaged_save_costs_only_time(tmp_path: Path, uninterrupted: bytes) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file)
    newest = tmp_path / "run" / "saves" / "step-000000012"
    (tensors,) = newest.glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:1000])
    (tmp_path / "run" / "weights.safetensors").unlink()
    printed = tiny_run.run(file, resume=True)
    assert f"warning: {newest} is damaged" in printed
    assert "at step 8" in printed
    assert weights(tmp_path / "run") == uninterrupted


def test_resuming_a_finished_run(tmp_path: Path, uninterrupted: bytes) -> None:
    file = tiny_run.write(tmp_path)
    tiny_run.run(file)
    (tmp_path / "run" / "weights.safetensors").unlink()
    assert "all steps were done already" in tiny_run.run(file, resume=True)
    assert weights(tmp_path / "run") == uninterrupted


def test_resuming_nothing_starts(tmp_path: Path, uninterrupted: bytes) -> None:
    assert "holds no save to resume: starting at step 0" in tiny_run.run(tiny_run.write(tmp_path), resume=True)
    assert weights(tmp_path / "run") == uninterrupted


def test_no_other_run_writes_to_the_folder_meanwhile(
    tmp_path: Path, own: Callable[[object], dict[str, str]], uninterrupted: bytes
) -> None:
    def another() -> None:
        with pytest.raises(ConfigurationError, match=r"run is being written by another gpipe train"):
            tiny_run.run(file, resume=True)

    file = tiny_run.write(tmp_path, loss=own(at_call(2, another)))
    tiny_run.run(file)
    assert weights(tmp_path / "run") == uninterrupted


def test_what_fails_at_the_first_step_leaves_no_run(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    with pytest.raises(ValueError, match=r"image"):
        tiny_run.run(file, "model.arguments.image_size=4")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    tiny_run.run(file, "training.steps=1")


def test_a_loss_that_is_no_number_stops_before_it_does_harm(
    tmp_path: Path, own: Callable[[object], dict[str, str]]
) -> None:
    file = tiny_run.write(tmp_path, loss=own(at_call(6, lambda: torch.tensor(float("nan")))))
    told = r"^step 6: the loss is nan; the newest save, .*step-000000004, is from before.* lower optimizer.lr"
    with pytest.raises(RunError, match=told):
        tiny_run.run(file)
    job = build(make_plan(read_configuration(file), file))
    assert Trainer(job, tmp_path / "run" / "saves").load(warnings.warn) is not None
    assert all(value.isfinite().all() for value in job.engine.weights().values())
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, own: Callable[[object], dict[str, str]]) -> None:
    class Ruin(ContrastiveLoss):
        @torch.no_grad()
        def clamp_(self) -> None:
            self.logit_scale.fill_(float("nan"))

    with pytest.raises(RunError, match=r"^step 1: the weights logit_scale are no longer all finite; there is no save"):
        tiny_run.run(tiny_run.write(tmp_path, loss=own(Ruin)), "training.save_every=1")
    assert not (tmp_path / "run" / "saves").exists()


class Masked(nn.Sequential):
    """Classifies digits; its first cell has a causal mask, as attention does."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self[0].register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))


CLASSIFY = {
    "loss": {"factory": "torch.nn.CrossEntropyLoss"},
    "data": {"name": "digits", "task": "classification"},
}


def test_a_constant_that_is_infinite_is_no_weight_gone_wrong(
    tmp_path: Path, own: Callable[[object], dict[str, str]]
) -> None:
    tiny_run.run(tiny_run.write(tmp_path, model=own(Masked), **CLASSIFY))
    assert read_weights(tmp_path / "run" / "weights.safetensors")["0.mask"].isinf().sum() == 3


def test_an_image_that_cannot_be_read_ends_the_run_in_a_line(
    tmp_path: Path, own: Callable[[object], dict[str, str]]
) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"no image")
    data = {"name": "image_folder", "path": str(tmp_path / "photos"), "task": "classification"}
    file = tiny_run.write(tmp_path, model=own(Masked), **CLASSIFY | {"data": data})
    with pytest.raises(
        RunError, match=r"^step 1: expected an image file, got .*\.png, which cannot be decoded .*repair"
    ):
        tiny_run.run(file, "training.batch_size=1")


def test_a_loss_that_is_no_scalar(tmp_path: Path, own: Callable[[object], dict[str, str]]) -> None:
    file = tiny_run.write(tmp_path, loss=own(lambda: lambda outputs, targets: outputs[0]))
    with pytest.raises(RunError, match=r"loss.factory: .* got shape \(8, 8\)"):
        tiny_run.run(file)


def test_the_loss_is_trained_and_clamped(tmp_path: Path, own: Callable[[object], dict[str, str]]) -> None:
    class Watched(ContrastiveLoss):
        seen: list[float] = []  # noqa: RUF012

        def clamp_(self) -> None:
            self.seen.append(self.logit_scale.item())
            with torch.no_grad():
                self.logit_scale.fill_(1.0)

    tiny_run.run(tiny_run.write(tmp_path, loss=own(Watched)))
    assert len(Watched.seen) == 12
    assert all(value != 1.0 for value in Watched.seen[1:]), "the optimizer moves it after every clamp"
    assert read_weights(tmp_path / "run" / "weights.safetensors")["logit_scale"].item() == 1.0


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: 3, r"loss.factory: gave a int; expected a callable of \(outputs, targets\)"),
        (lambda: 1 / 0, r"loss.factory: ZeroDivisionError: division by zero \(in .*test_loop.py, line \d+\)"),
        (
            lambda: nn.ParameterDict({"positional_embedding": torch.ones(2)}),
            "model and loss both have weights named pos",
        ),
    ],
)
def test_parts_that_do_not_fit(
    tmp_path: Path, own: Callable[[object], dict[str, str]], build: object, told: str
) -> None:
    with pytest.raises(ConfigurationError, match=told):
        tiny_run.run(tiny_run.write(tmp_path, loss=own(build)))
    assert {path.name for path in (tmp_path / "run").glob("*")} <= {".lock"}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pipeline.stages=9", r"pipeline: 9 devices for \d cells"),
        ("pipeline.balance=[1, 1]", r"pipeline: balance must sum to the number of cells"),
        ("training.batch_size=5000", r"training.batch_size: should be at most \d+, the rows of the training data"),
        ("pipeline.devices=meta:7x", r"'meta:7x' is no device of torch"),
        ("model.factory=torch.nn.ReLU", r"pipeline: .*cells\(\)"),
        ("data={name: text, path: /nowhere}", r"data: .*/nowhere"),
    ],
)
def test_settings_that_do_not_fit_model_data_or_machine(tmp_path: Path, override: str, told: str) -> None:
    arguments = ["model.arguments={}"] if override.startswith("model.factory") else []
    with pytest.raises(ConfigurationError, match=told):
        tiny_run.run(tiny_run.write(tmp_path), override, *arguments)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once(tmp_path: Path, own: Callable[[object], dict[str, str]]) -> None:
    class Killed(Exception):
        pass

    def kill() -> None:
        raise Killed

    file = tiny_run.write(tmp_path, loss=own(at_call(8, kill)))
    with pytest.raises(Killed, match=r"^$"):
        tiny_run.run(file, "logging.every=1")
    own(ContrastiveLoss)
    tiny_run.run(file, "logging.every=1", resume=True)  # from step 4, though steps 5 to 7 were written
    shown = scalars(tmp_path / "run")
    tags = {"loss", "learning_rate", "samples_per_second", "peak_memory_mebibytes/process"}
    assert shown.keys() == tags | {"busy/stage_0", "busy/stage_1"}
    assert [step for step, _ in shown["loss"]] == list(range(1, 13))
    assert shown["learning_rate"][0][1] == pytest.approx(0.01 / 3)
    assert all(0 < value <= 1 for stage in (0, 1) for _, value in shown[f"busy/stage_{stage}"])
    assert 50 < shown["peak_memory_mebibytes/process"][0][1] < 50_000
