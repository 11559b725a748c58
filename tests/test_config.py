import sys
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml

from gpipe.training.build import make_plan
from gpipe.training.config import Configuration
from gpipe.training.errors import ConfigurationError
from gpipe.training.factory import FactoryError, checked_arguments, resolve
from gpipe.training.reading import dump, read_configuration


def problem(file: Path, *overrides: str) -> str:
    """What is told about a configuration that must be refused."""
    with pytest.raises(ConfigurationError, match=r".") as caught:
        make_plan(read_configuration(file, overrides), file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pipeline.stagse=3", "pipeline.stagse: unknown key, given 3; did you mean 'stages'? (allowed here: stages, "),
        ("piplines.stages=3", "piplines: unknown key, given {\"stages\": 3}; did you mean 'pipeline'?"),
        ("pipeline.stages=0", "pipeline.stages: should be greater than 0, given 0"),
        ("pipeline.stages='4'", 'pipeline.stages: should be a whole number, given "4"'),
        ("pipeline.stages=true", "pipeline.stages: should be a whole number, given true"),
        ("pipeline.checkpoint=often", "pipeline.checkpoint: should be 'always', 'except_last' or 'never' or a whole"),
        ("pipeline.devices=gpu", "pipeline.devices: 'gpu' is no device of torch"),
        (
            "pipeline.devices=[cpu, meta]",
            "pipeline.devices: 'meta' holds no values to train; give 'cpu' or an accelerator",
        ),
        ("pipeline.devices=[cpu]", "pipeline: devices has 1 entries but stages is 2"),
        ("pipeline.balance=[1, 2, 3]", "pipeline: balance has 3 entries but stages is 2"),
        ("training=", "training: should be a mapping, given null"),
        ("training.precision=float16", "training.precision: should be 'float32' or 'bfloat16', given \"float16\""),
        ("training.schedule.name=cosin", "training.schedule.name: should be one of constant, linear, cosine, given"),
        ("training.schedule={}", "training.schedule.name: is required: one of constant, linear, cosine"),
        ("training.schedule.warmup=1", "training.schedule.warmup: unknown key, given 1; did you mean 'warmup_steps'?"),
        (
            "training.schedule.decay_steps=3",
            "decay_steps is 3 but warmup_steps is 3; the way down ends at step decay_st",
        ),
        ("data={name: cifar10, path: x, std: [1, 0, 1]}", "data.std.1: should be greater than 0, given 0"),
        ("data.name=digit", "data.name: should be one of digits, coloured_digits, "),
        ("data.templtes=[a]", "data.templtes: unknown key, given [\"a\"]; did you mean 'templates'?"),
        ("data.templates=[a, 1]", "data.templates.1: should be text, given 1"),
        ("optimizer.name=adamw", "given 'adamw'; did you mean 'AdamW'?"),
        ("optimizer.name=LBFGS", "optimizer.name: should be one of ASGD, "),
        ("optimizer.lr=fast", 'optimizer.lr: should be a number, given "fast"'),
        ("optimizer.lr=-1", "optimizer: AdamW refuses its arguments: Invalid learning rate: -1"),
        ("optimizer.beta=[0, 1]", "optimizer.beta: unknown key, given [0, 1]; did you mean 'betas'?"),
        ("model.factory=gpipe.modles.clip.clip", "model.factory: 'gpipe' has no module or attribute 'modles'; did you"),
        ("model.factory=gpipe.models.clip.clp", "has no module or attribute 'clp'; did you mean 'clip'?"),
        ("model.factory=gpipe.models.clip.CLIP.cels", "'gpipe.models.clip.CLIP' has no attribute 'cels'; did you mean"),
        ("model.factory=nowhere.build", "model.factory: there is no module 'nowhere', neither installed nor in "),
        ("model.factory=clip", "model.factory: 'clip' is no dotted path such as 'my_module.build'"),
        (
            "model.factory=gpipe.models.clip",
            "model.factory: 'gpipe.models.clip' is of type module and cannot be called",
        ),
        (
            "model.arguments.image_sise=8",
            "model.arguments.image_sise: unknown key, given 8; did you mean 'image_size'?",
        ),
        ("model.arguments.image_size=big", 'model.arguments.image_size: should be a whole number, given "big"'),
        ("model.arguments.activation=relu", "model.arguments.activation: should be 'quick_gelu' or 'gelu', given"),
        ("loss={factory: torch.nn.Linear}", "loss.arguments.in_features: is required"),
        ("output=", "output: should be text, given null"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, told: str) -> None:
    file = tiny_run.write(tmp_path)
    message = problem(file, override)
    assert message.startswith(f"{file}: ")
    assert told in message


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    message = problem(tiny_run.write(tmp_path), "training.steps=x", "logging.evry=1", "pipeline.chunks=-1")
    assert "3 problems" in message
    assert all(key in message for key in ("training.steps", "logging.evry", "pipeline.chunks"))
    message = problem(tiny_run.write(tmp_path), "optimizer.x=1", "loss.factory=a.b")
    assert all(key in message for key in ("optimizer.x", "loss.factory"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("training..steps=3", "expected key=value"),
        ("training.steps.x=3", "training.steps holds a value, not a mapping"),
        ("training.steps=[1", "the value is no valid YAML: line 1, column 3"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, told: str) -> None:
    message = problem(tiny_run.write(tmp_path), override)
    assert message.startswith(f"--set {override}: ")
    assert told in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"model: [1\nloss: 2\n", "line 2, column 5: expected ',' or ']'"),
        (b"model: 1\nloss: 2\nmodel: 3\n", "line 3, column 1: the key 'model' stands twice"),
        (b"training:\n  on: 1\n", "line 2, column 3: a key that is not text"),
        (b"model: *nowhere\n", "line 1, column 8: found undefined alias"),
        (b"model: !!python/object:os.system {}\n", "could not determine a constructor"),
        (b"", "is empty; expected a mapping with the keys model, loss, data"),
        (b"- 1\n", "holds a list; expected a mapping"),
        (b"model: \xff\n", "cannot be read"),
        (b"model: !!binary aGk=\n", "holds a value that is not plain data"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    message = problem(file)
    assert message.startswith(f"{file}: ")
    assert told in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert problem(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: there is no such file"
    assert "cannot be read" in problem(tmp_path)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("-2E3", -2000.0), ("1.5e3", 1500.0), (".5e1", 5.0)])
def test_exponents_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    configuration = read_configuration(tiny_run.write(tmp_path), [f"optimizer.lr={text}"])
    assert configuration.optimizer.arguments["lr"] == value


def test_yaml_keeps_its_good_sides(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    merged = file.read_text().replace("pipeline:\n", "pipeline:\n  <<: {stages: 7, threads: 3}\n")
    file.write_text(merged)
    configuration = read_configuration(file, ["data.templates=[2024-01-01, é]"])
    assert (configuration.pipeline.stages, configuration.pipeline.threads) == (2, 3)
    assert configuration.data.templates == ["2024-01-01", "é"]  # type: ignore[union-attr]


def test_an_override_reaches_a_section_that_the_file_leaves_out(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    values = yaml.safe_load(file.read_text())
    del values["pipeline"]
    file.write_text(yaml.safe_dump(values))
    assert read_configuration(file).pipeline.stages == 1
    assert read_configuration(file, ["pipeline.stages=4"]).pipeline.stages == 4


def test_the_copy_says_the_same(tmp_path: Path) -> None:
    configuration = read_configuration(tiny_run.write(tmp_path), ["training.clip_gradient_norm=1e-12"])
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(configuration))
    assert read_configuration(copy) == configuration
    assert "deferred_batch_norm: false" in copy.read_text()


def test_every_setting_is_documented() -> None:
    sections = [Configuration, *(field.annotation for field in Configuration.model_fields.values())]
    for section in sections:
        if section.__module__ == "gpipe.training.config":
            undocumented = [key for key in section.model_fields if f"{key}: " not in (section.__doc__ or "")]
            assert not undocumented, section


def test_a_module_in_the_current_directory_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_own_models.py").write_text("class Net:\n    @staticmethod\n    def build(): return 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert resolve("users_own_models.Net.build")() == 3


def test_a_module_that_fails_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_broken_module.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "users_missing_import.py").write_text("import a_library_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FactoryError, match=r"'users_broken_module' failed: ZeroDivisionError.*users_broken.*line 2"):
        resolve("users_broken_module.build")
    with pytest.raises(FactoryError, match=r"'users_missing_import' failed: .*No module named 'a_library_nobody_has'"):
        resolve("users_missing_import.build")


def test_arguments_come_as_the_annotations_want_them() -> None:
    def build(sizes: tuple[int, ...], rate: float = 0.0, copy: "Unknown" = None, **more: int) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def checked(sizes: tuple[int, ...], rate: float = 0.0, *, where: Path | None = None) -> None: ...

    # One annotation that only a type checker can resolve: then nothing is known about any of them.
    assert checked_arguments(build, {"sizes": [1], "x": 2}, "a") == {"sizes": [1], "x": 2}
    assert checked_arguments(checked, {"sizes": [1, 2], "rate": 1, "where": "x"}, "a") == {
        "sizes": (1, 2),
        "rate": 1.0,
        "where": Path("x"),
    }
    with pytest.raises(FactoryError, match=r"^a.sizes: is required; a.rat: unknown key, given 1; did you mean 'rate'"):
        checked_arguments(checked, {"rat": 1}, "a")
    assert checked_arguments(dict, {"anything": 1}, "a") == {"anything": 1}


def test_no_file_can_say_a_module(tmp_path: Path) -> None:
    def wrap(inner: torch.nn.Module, factor: float | torch.Tensor = 1.0) -> None: ...

    with pytest.raises(
        FactoryError,
        match=r"^a.inner: wants an object that no file can hold.*; a.factor: should be a number, given \"x\"$",
    ):
        checked_arguments(wrap, {"inner": 3, "factor": "x"}, "a")
