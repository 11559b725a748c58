import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import yaml
from typer.testing import CliRunner, Result

from gpipe.training.build import build, make_plan
from gpipe.training.cli import app
from gpipe.training.config import OptimizerConfig, PipelineConfig
from gpipe.training.errors import ConfigurationError
from gpipe.training.hardware import EFFICIENCY, FACTS, known_device
from gpipe.training.plan_devices import local_devices
from gpipe.training.plan_refusals import size_above
from gpipe.training.plan_search import chunk_counts, stage_counts
from gpipe.training.plan_workload import static_bytes
from gpipe.training.reading import read_configuration

OWN_MODELS = """
import torch
from torch import nn
from gpipe.skip import pop, skippable, stash

class Embed(nn.Embedding):
    pass

class Peeks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

def net(layers: int, width: int) -> nn.Module:
    layer = lambda: nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
    return nn.Sequential(Embed(256, width), *(layer() for _ in range(layers)), nn.Linear(width, 256))

def computes(layers: int, width: int) -> nn.Module:
    float(torch.ones(1))  # which the meta device refuses
    return net(layers, width)

def peeks() -> nn.Module:
    return nn.Sequential(Embed(256, 8), Peeks())

def tied() -> nn.Module:
    embed, shared = Embed(256, 8), nn.Linear(8, 8)
    return nn.Sequential(embed, shared, nn.ReLU(), shared)

def nothing() -> nn.Module:
    return nn.Sequential()

@skippable(stash=["early"])
class Early(nn.Linear):
    def forward(self, x):
        yield stash("early", x)
        return super().forward(x)

@skippable(pop=["early"])
class Late(nn.Linear):
    def forward(self, x):
        early = yield pop("early")
        return super().forward(torch.cat([x, early], -1))

def skips(width: int) -> nn.Module:
    middle = (nn.Linear(width, width) for _ in range(3))
    return nn.Sequential(Embed(256, width), Early(width, width), *middle, Late(2 * width, 256))

def loss():
    return lambda outputs, targets: outputs.mean()
"""


SMALL = ("--set", "training.batch_size=2")  # few chunk counts to try


def plan(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})
    finally:
        torch.set_num_threads(threads)


def planned(*arguments: object) -> dict[str, Any]:
    """What --json prints."""
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def told(*arguments: object, code: int = 2) -> str:
    """What is said about a mistake, and nothing besides."""
    result = plan(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    return result.stderr


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models above; the configuration of one of them is written by `own_file`."""
    (tmp_path / "plan_own_models.py").write_text(OWN_MODELS)
    (tmp_path / "text.txt").write_text("hello " * 4000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "plan_own_models", raising=False)
    return tmp_path


def own_file(folder: Path, factory: str, **arguments: int) -> Path:
    return tiny_run.write(
        folder,
        model={"factory": f"plan_own_models.{factory}", "arguments": arguments},
        loss={"factory": "plan_own_models.loss"},
        data={"name": "text", "path": "text.txt", "context_length": 32},
    )


def devices_file(folder: Path, *devices: Any) -> Path:
    file = folder / "devices.yaml"
    file.write_text(yaml.safe_dump(list(devices)))
    return file


def device(**changes: Any) -> dict[str, Any]:
    """A device of a file; a key set to None is left out."""
    given = {"flops": 1e9, "bytes_per_second": 1e12, "memory": "1GiB", "link": {"latency": 0, "bandwidth": 1e12}}
    return {key: value for key, value in (given | changes).items() if value is not None}


def test_what_is_printed_can_be_pasted(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    result = plan(file, *SMALL, "--devices", "3xH100")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 x H100: 74.51 GiB, 33.5 TFLOP/s, 1675 GB/s, links 225 GB/s after 10 us (50% of")
    assert result.stderr == ""
    best = planned(file, *SMALL, "--devices", "3xH100")["choices"][0]
    section = yaml.safe_load(result.stdout[result.stdout.index("pipeline:") :].partition("\n\n")[0])["pipeline"]
    assert section == {
        "stages": best["stages"],
        "balance": best["balance"],
        "chunks": best["chunks"],
        "checkpoint": best["keep"],
    }
    pasted = tiny_run.write(tmp_path, name="pasted.yaml", pipeline=section)
    pipe = build(make_plan(read_configuration(pasted), pasted)).engine.pipe
    assert (list(pipe.balance), pipe.chunks) == (best["balance"], best["chunks"])
    assert f"{best['stages']} stages, {best['chunks']} micro-batches, gpipe: " in result.stdout  # the partition's table


def test_the_choices_as_json(tmp_path: Path) -> None:
    found = planned(tiny_run.write(tmp_path), "--devices", "3xA100-40GB", "--memory", "100KB")
    assert (found["costs"], found["schedule"], found["batch_size"]) == ("estimate", "gpipe", 8)
    assert found["optimizer"] == {"name": "AdamW", "static_bytes_per_parameter_byte": 4.0, "counted": True}
    assert [d["name"] for d in found["devices"]] == ["A100-40GB"] * 3
    assert found["devices"][0]["memory"] == 100_000
    assert found["devices"][0]["flops"] == EFFICIENCY * 19.5e12
    choices, refused = found["choices"], found["refused"]
    assert [c["seconds"] for c in choices] == sorted(c["seconds"] for c in choices)
    for choice in choices:
        assert len(choice["balance"]) == len(choice["keep"]) == len(choice["bytes"]) == choice["stages"]
        assert sum(choice["balance"]) == found["cells"]
        assert max(choice["keep"]) <= choice["chunks"]
        assert max(choice["bytes"]) <= 100_000
        assert choice["samples_per_second"] == pytest.approx(8 / choice["seconds"])
    pairs = {(x["stages"], x["chunks"]) for x in [*choices, *refused]}
    assert pairs == {(stages, chunks) for stages in (1, 2, 3) for chunks in (1, 2, 3, 4, 8)}
    assert [(x["stages"], x["chunks"]) for x in [*choices, *refused] if x["configured"]] == [(2, 3)]
    assert refused
    assert any("needs more memory than with" in x["reason"] for x in refused)
    assert all(x["missing_bytes"] is None or x["missing_bytes"] > 0 for x in refused)


@pytest.mark.parametrize("source", [("--devices", "3xH100"), ()], ids=["estimated", "measured"])
def test_a_model_with_skips_is_planned(own: Path, source: tuple[str, ...]) -> None:
    found = planned(own_file(own, "skips", width=64), *SMALL, *source)
    assert {choice["chunks"] for choice in found["choices"]} == {1, 2}
    assert found["cells"] == 6


def test_the_table_says_why_others_were_refused(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path, pipeline={"stages": 2, "chunks": 1})
    output = plan(file, *SMALL, "--devices", "2xH100", "--memory", "70KB").stdout
    table, _, rest = output.partition("Refused:\n")
    assert re.search(r"^ best +2 +2 .* KiB +[01] +", table, re.MULTILINE)
    lines = rest.partition("\n\n")[0].splitlines()
    assert re.match(
        r"  1 stage, chunks 1, 2: .* too much on stage 0 \(cells 0 \.\. 6\) with 2 chunks; --memory ", lines[0]
    )
    assert lines[0].endswith("KiB would do")


def test_the_table_marks_what_the_configuration_has(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path, pipeline={"stages": 1, "chunks": 2})
    output = plan(file, *SMALL, "--devices", "2xL4").stdout
    assert re.search(r"^(best)? +now +1 +2 ", output, re.MULTILINE)
    assert "now: the stages and chunks that the configuration has." in output


def test_this_machine_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpipe.training.plan_devices._cores", lambda: 2)
    file = tiny_run.write(tmp_path, pipeline={"stages": 2, "chunks": 3, "threads": 1, "devices": ["cpu", "cpu"]})
    result = plan(file, "--set", "training.batch_size=4")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("2 x cpu: no limit of memory (pipeline.threads: 1)\nCosts are measured on this ma")
    measured = [line for line in result.stderr.splitlines() if line.startswith("measuring ")]
    assert measured[0].endswith("cells on cpu: chunks 3, 2 rows each")  # the configuration's own first
    assert [line.split("chunks ")[1] for line in measured[1:]] == [f"{n}, {4 // n} rows each" for n in (4, 2, 1)]
    section = yaml.safe_load(result.stdout[result.stdout.index("pipeline:") :].partition("\n\n")[0])["pipeline"]
    assert section["threads"] == 1
    assert section["devices"] == ["cpu"] * section["stages"]


def test_a_cpu_is_as_many_devices_as_its_cores_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpipe.training.plan_devices._cores", lambda: 5)
    counts = [len(local_devices(PipelineConfig(devices="cpu", threads=threads))) for threads in (1, 2, 5, 6)]
    assert counts == [5, 2, 1, 1]


def test_an_accelerator_is_limited_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (10, 100 + device.index))
    found = local_devices(PipelineConfig(devices=["cuda:1", "cuda:0", "cuda:1"], stages=3))
    assert [(device.name, device.memory) for device in found] == [("cuda:1", 101), ("cuda:0", 100)]

    def absent(device: object) -> None:
        raise RuntimeError("no driver\nand a long story")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", absent)
    with pytest.raises(ConfigurationError, match=r"^pipeline.devices: 'cuda:0' cannot be used here: no driver$"):
        local_devices(PipelineConfig(devices="cuda:0"))


def test_measuring_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpipe.training.plan_costs._BUDGET", 0.0)
    found = planned(tiny_run.write(tmp_path, pipeline={"chunks": 4, "devices": "cpu"}))
    assert found["costs"] == "measured"
    assert {c["chunks"] for c in found["choices"]} == {4}
    assert all(c["seconds"] > 0 for c in found["choices"])
    assert {r["reason"] for r in found["refused"]} == {"not measured: it would take more than a minute"}


def test_devices_of_a_file_may_differ(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    mixed = devices_file(tmp_path, device(), device(flops=1e8), "2xH100")
    found = planned(file, *SMALL, "--devices", mixed)
    assert [d["name"] for d in found["devices"]] == ["device 0", "device 1", "H100", "H100"]
    (slow,) = (c["balance"] for c in found["choices"] if (c["stages"], c["chunks"]) == (2, 2))
    alike = devices_file(tmp_path, device(), device())
    found = planned(file, *SMALL, "--devices", alike)
    (even,) = (c["balance"] for c in found["choices"] if (c["stages"], c["chunks"]) == (2, 2))
    assert slow[1] < even[1]


def test_memory_and_links_of_a_file_count(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    spec = devices_file(tmp_path, device(memory="70KB"), device(memory=50_000))
    choices = planned(file, *SMALL, "--devices", spec)["choices"]
    assert {c["stages"] for c in choices} == {2}
    assert all(c["bytes"][0] <= 70_000 and c["bytes"][1] <= 50_000 for c in choices)
    spec = devices_file(tmp_path, device(memory="20KB"), device(memory="10KB"))
    message = told(file, *SMALL, "--devices", spec)
    assert "2 devices of 9.77 KiB to 19.53 KiB, " in message
    assert "KiB more on every device with 2 stages and 2 chunks\n" in message
    far = device(link={"latency": 10, "bandwidth": 1e12})
    spec = devices_file(tmp_path, device(), far)
    assert planned(file, *SMALL, "--devices", spec)["choices"][0]["stages"] == 1


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is empty; expected a list of devices"),
        ("[]", "is empty; expected a list of devices"),
        ("H100", "holds a str; expected a list of devices"),
        ("[1", "line 1, column 3: "),
        ("[H10]", "device 0: should be a count and a name such as 8xH100, "),
        ("[H100, 3]", "device 1: should be a name such as H100, or a mapping with the keys flops, bytes_per_second, "),
        ("[{memory: 1GiB}]", "device 0.flops: is required"),
        ("[{<<: &a {bytes_per_second: 1e12, memory: 1GiB, link: {latency: 0, bandwidth: 1e9}}}]", "device 0.flops: is"),
        ("flops: .nan", "device 0.flops: should be a finite number, given NaN"),
        ("flops: -1", "device 0.flops: should be greater than 0, given -1"),
        ("flops: '9'", 'device 0.flops: should be a number, given "9"'),
        ("bytes_per_second: .inf", "device 0.bytes_per_second: should be a finite number, given Infinity"),
        ("memory: lots", "device 0: memory: must be a size, such as '20GiB'"),
        ("memory: 0", "device 0: memory: must be more than nothing"),
        ("memory: [1]", "device 0.memory: should be text or a whole number, given [1]"),
        ("link: {latency: -1, bandwidth: 1}", "device 0.link.latency: should be greater than or equal to 0, given"),
        ("link: {latency: 0, bandwidth: 0}", "device 0.link.bandwidth: should be greater than 0, given 0"),
        ("link: {latency: 0, bandwith: 1}", "device 0.link.bandwith: unknown key, given 1; did you mean 'bandwidth'?"),
        ("flop: 1", "device 0.flop: unknown key, given 1; did you mean 'flops'? (allowed here: flops, "),
    ],
)
def test_what_is_wrong_in_a_devices_file_is_named(tmp_path: Path, content: str, what: str) -> None:
    spec = tmp_path / "devices.yaml"
    if content[:1].islower() and ": " in content:  # one key of an otherwise sound device
        content = yaml.safe_dump([device(**yaml.safe_load(content))])
    spec.write_text(content)
    message = told(tiny_run.write(tmp_path), "--devices", spec)
    assert message.startswith(f"{spec}: ")
    assert what in message


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--devices", "8xH10"], "--devices: should be a count and a name such as 8xH100, or a file ending in .yaml"),
        (["--devices", "8xH10"], "given '8xH10'; did you mean 'H100'? (known: V100-16GB, "),
        (["--devices", "8"], "--devices: should be a count and a name such as 8xH100"),
        (["--devices", ""], "--devices: should be a count and a name such as 8xH100"),
        (["--devices", "0xH100"], "--devices: should be 1 to 4096 devices, given '0xH100'"),
        (["--devices", "99999999999xH100"], "--devices: should be 1 to 4096 devices"),
        (["--devices", "none.yaml"], "none.yaml: there is no such file"),
        (["--devices", "2xV100-16GB", "--set", "training.precision=bfloat16"], "V100-16GB does not multiply in bfloat"),
        (["--devices", "TPUv3-core"], "--devices: TPUv3-core does not multiply in float32: choose other devices"),
        (["--memory", "lots"], "--memory: must be a size, such as '20GiB', '500 MB' or a number of bytes, got 'lots'"),
        (["--memory", "0"], "--memory: must be more than nothing, got 0 bytes"),
        (["--memory", "-1GiB"], "--memory: must be a size"),
        (["--set", "pipeline.stagse=3"], "pipeline.stagse: unknown key, given 3; did you mean 'stages'?"),
        (["--set", "model.factory=gpipe.models.clip.clp"], "has no module or attribute 'clp'; did you mean 'clip'?"),
        (["--set", "training.batch_size=100000"], "training.batch_size: "),
        (
            ["--set", "model.factory=torch.nn.ReLU", "--set", "model.arguments={}"],
            "model.factory: GPipe wraps an nn.Seq",
        ),
        (["--set", "pipeline={devices: [cpu, 'cuda:0'], stages: 2}"], "pipeline.devices: should be of one kind"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, arguments: list[str], what: str) -> None:
    message = told(tiny_run.write(tmp_path), *arguments)
    assert what in message
    assert len(message.splitlines()) == 1


def test_a_devices_folder_or_binary_cannot_be_read(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read: " in told(file, "--devices", tmp_path / "folder.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read: " in told(file, "--devices", tmp_path / "binary.yaml")


def test_nothing_fits_and_what_would(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    message = told(file, *SMALL, "--devices", "2xH100", "--memory", "20KB")
    assert "no choice fits the memory: " in message
    assert "on up to 2 devices of 19.53 KiB, with up to 2 chunks of 2 rows. Would do: --memory " in message
    size = message.partition("--memory ")[2].split()[0]
    assert planned(file, *SMALL, "--devices", "2xH100", "--memory", size)["choices"]
    smaller = f"{float(size.removesuffix('KiB')) * 1024 - 20:.0f}"
    assert "no choice fits" in told(file, *SMALL, "--devices", "2xH100", "--memory", smaller, "--json")


def test_enough_devices_would_do(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path)
    message = told(file, *SMALL, "--devices", "1xH100", "--memory", "60KB")
    devices = int(message.rpartition("; or ")[2].split()[0])
    assert planned(file, *SMALL, "--devices", f"{devices}xH100", "--memory", "60KB")["choices"]
    if devices > 2:
        assert "no choice fits" in told(file, *SMALL, "--devices", f"{devices - 1}xH100", "--memory", "60KB")


def test_stages_that_cannot_be_are_named(tmp_path: Path) -> None:
    file = tiny_run.write(tmp_path, pipeline={"stages": 5, "chunks": 2})
    found = planned(file, *SMALL, "--devices", "2xH100")
    (refusal,) = found["refused"]
    assert (refusal["stages"], refusal["configured"]) == (5, True)
    assert "2 devices, and a stage takes one of each" in refusal["reason"]


def test_a_model_that_fits_no_machine_is_planned_from_its_shapes(own: Path) -> None:
    file = own_file(own, "net", layers=200, width=4096)  # 40 billion parameters
    found = planned(file, "--devices", "16xB200", *SMALL, "--set", "training.precision=bfloat16")
    best = found["choices"][0]
    assert found["cells"] == sum(best["balance"]) == 202
    assert sum(best["bytes"]) > 4 * 4 * 40e9


def test_a_factory_that_computes_is_built_with_weights(own: Path) -> None:
    shapes = planned(own_file(own, "net", layers=2, width=16), *SMALL, "--devices", "2xH100")
    assert planned(own_file(own, "computes", layers=2, width=16), *SMALL, "--devices", "2xH100") == shapes


def test_a_model_that_needs_values_says_so(own: Path) -> None:
    message = told(own_file(own, "peeks"), "--devices", "2xH100", code=1)
    assert message.startswith("the model cannot be estimated from shapes alone: ")
    assert "raised while estimating cell 1 ('1', Peeks)" in message
    assert "leave --devices out" in message
    assert planned(own_file(own, "peeks"), "--set", "pipeline.devices=cpu", "--set", "pipeline.stages=1")["choices"]


def test_stages_that_would_share_a_module_are_refused(own: Path) -> None:
    found = planned(own_file(own, "tied"), *SMALL, "--devices", "4xH100")
    assert {c["stages"] for c in found["choices"]} <= {1, 2}
    assert all("must belong to one stage" in r["reason"] for r in found["refused"])


def test_an_empty_model(own: Path) -> None:
    assert "model.factory: gave a model without cells" in told(own_file(own, "nothing"), "--devices", "2xH100")


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("SGD", {"lr": 0.1}, (2.0, True)),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, (3.0, True)),
        ("Adam", {"lr": 0.1}, (4.0, True)),
        ("AdamW", {"lr": 0.1, "amsgrad": True}, (5.0, True)),
        ("Adafactor", {}, (2.0, True)),
        ("Adam", {"capturable": True}, (4.0, False)),
    ],
)
def test_what_an_optimizer_holds_is_counted(name: str, arguments: dict[str, Any], expected: tuple[float, bool]) -> None:
    assert static_bytes(OptimizerConfig(name=name, **arguments)) == expected


def test_an_optimizer_that_cannot_be_counted_says_so(tmp_path: Path) -> None:
    optimizer = {"name": "Adam", "capturable": True}
    output = plan(tiny_run.write(tmp_path, optimizer=optimizer), *SMALL, "--devices", "H100").stdout
    assert "Adam holds 4 bytes per byte of parameters, gradient included, an assumption.\n" in output


@pytest.mark.parametrize(
    ("rows", "stages", "own", "usual", "more"),
    [
        (256, 1, 4, [4, 8, 2, 1], [16, 32, 64, 128, 256]),
        (256, 4, 4, [4, 32, 16, 8, 2, 1], [64, 128, 256]),
        (100, 2, 300, [100, 10, 4, 2, 1], []),  # 8 gives way to a divisor
        (7, 8, 3, [3, 7, 4, 2, 1], []),
        (1, 8, 4, [1], []),
    ],
)
def test_chunks_worth_a_look(rows: int, stages: int, own: int, usual: list[int], more: list[int]) -> None:
    assert chunk_counts(rows, stages, own) == (usual, more)


@pytest.mark.parametrize(
    ("most", "own", "counts"),
    [(1, 4, [1]), (5, 2, [1, 2, 3, 4, 5]), (12, 3, [1, 2, 3, 4, 8, 12]), (16, 99, [1, 2, 4, 8, 16])],
)
def test_stages_worth_a_look(most: int, own: int, counts: list[int]) -> None:
    assert stage_counts(most, own) == counts


@pytest.mark.parametrize(("size", "text"), [(5, "5"), (1024, "1.00KiB"), (1025, "1.01KiB"), (2**30 + 1, "1.01GiB")])
def test_sizes_are_rounded_up(size: int, text: str) -> None:
    assert size_above(size) == text


@pytest.mark.parametrize("name", FACTS)
def test_the_table_of_devices_is_sound(name: str) -> None:
    facts = FACTS[name]
    assert 2**33 < facts.memory < 2**40
    assert 0 < facts.link < facts.bytes_per_second < 1e13
    assert facts.source
    found = known_device(name, "float32" if facts.float32 else "bfloat16")
    assert found.speed is not None
    assert found.speed.bytes == EFFICIENCY * facts.bytes_per_second


def test_help_names_the_options() -> None:
    output = CliRunner().invoke(app, ["plan", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(option in output for option in ("FILE.yaml", "--devices", "--memory", "--set", "--json"))
