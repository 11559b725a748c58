"""The first hour on a machine, on simulated accelerators: parts that fail, hang or get no time; steps as simulated."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpipe
from benchmarks import on_device
from benchmarks.device_parts import correctness, overlap, traps
from benchmarks.device_parts.bench import PARTS, Bench, encoder, in_turns
from benchmarks.device_parts.correctness import BALANCES, apart, trained
from benchmarks.device_parts.several import on_streams
from benchmarks.device_parts.traps import differ
from benchmarks.on_device import CANNOT, CUT, FAILED, INTERRUPTED, NO_ACCELERATOR, NO_TIME, RAN, Outcome
from gpipe.costs import StageCost
from gpipe.schedule import Kind
from gpipe.testing import accelerators
from gpipe.testing.accelerators import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators: --accelerators"),
]


@pytest.fixture
def bench(tmp_path):
    with (tmp_path / "rows.jsonl").open("w") as file:
        yield Bench(torch.device("sim", 0), 4, file, "some part")


def rows(tmp_path):
    return on_device.written(tmp_path / "rows.jsonl", 0)


def test_parts_run_on_simulated_devices_and_leave_json_and_tables(tmp_path, capsys):
    parts = ["cap", "machine", "traps"]
    assert on_device.main(["--simulated", "2", "--out", str(tmp_path), "--parts", *parts]) == 0
    record = json.loads((tmp_path / "summary.json").read_text())
    found = {part["name"]: part for part in record["parts"]}
    assert list(found) == ["machine", "traps", "cap"]  # in their own order
    assert [part["status"] for part in record["parts"]] == [RAN, RAN, CANNOT]
    assert found["machine"]["rows"][0]["count"] == 2
    assert "needs CUDA" in found["cap"]["why"]
    checks = found["traps"]["rows"]
    assert [row.get("right") for row in checks] == [True, True, True, None, None, True]
    assert [row["not_looked_at"] for row in checks if "right" not in row] == ["needs CUDA, which captures graphs"] * 2
    assert not record["error"]
    printed = capsys.readouterr().out
    assert [printed.count(f"\n{name} begins, and has ") for name in parts] == [1, 1, 1]
    for summary in ((tmp_path / "summary.md").read_text(), printed):
        assert "| 4 right |" in summary
        assert "| cap | cannot run |" in summary
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {line["part"] for line in lines} == {"machine", "traps", "cap"}


@pytest.mark.rare
def test_a_machine_without_accelerators_is_an_error(tmp_path):
    command = [sys.executable, "-m", "benchmarks.on_device", "--out", str(tmp_path), "--parts", "machine", "exact"]
    environment = none_simulated() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=on_device.ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.splitlines()[-1].startswith("nothing was checked: this machine has no accelerator")
    (part,) = json.loads((tmp_path / "summary.json").read_text())["parts"]  # the others would say the same
    assert part["status"] == NO_ACCELERATOR


def none_simulated():
    return {name: value for name, value in os.environ.items() if name != accelerators.COUNT}


@pytest.mark.rare
def test_simulated_accelerators_that_cannot_be_built_are_said_in_a_line(tmp_path):
    environment = none_simulated() | {"CXX": "no-such-compiler", build.BUILD: str(tmp_path / "build")}
    command = [sys.executable, "-m", "benchmarks.on_device", "--simulated", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=on_device.ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (2, "")
    (line,) = done.stdout.splitlines()
    assert "no-such-compiler (install g++)" in line
    command += ["--part", "exact", "--rows", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=on_device.ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    (row,) = rows(tmp_path)
    assert row["raised"].startswith("BuildError: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "nan"], "positive number of seconds, was given nan"),
        (["--budget", "inf"], "positive number of seconds, was given inf"),
        (["--budget", "0"], "positive number of seconds, was given 0"),
        (["--budget", "-5"], "positive number of seconds, was given -5"),
        (["--simulated", "-1"], "expected 1 or more, or 0 for real accelerators, was given -1"),
    ],
)
def test_times_and_counts_that_are_none_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        on_device.arguments(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["pairs", "speed", "several", "actions", "threads", "bytes_and_seconds", "alignment", "generators"]
)
def test_a_part_reports_finite_numbers_and_races_nowhere(bench, tmp_path, name):
    PARTS[name].run(bench)
    found = rows(tmp_path)
    assert found
    assert all(row.get("right", True) and "races" not in row and "cannot" not in row for row in found)
    assert all(math.isfinite(value) for row in found for value in row.values() if isinstance(value, float))


def test_every_part_is_in_the_order_and_in_the_help(capsys):
    assert set(PARTS) == set(on_device.NAMES)
    errors = [PARTS[name].correctness for name in on_device.NAMES if name != "machine"]
    assert errors == sorted(errors, reverse=True)  # what is wrong comes before what is slow
    with pytest.raises(SystemExit):
        on_device.main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name}" in said for name in on_device.NAMES)
    assert "limits are 1,080 s together" in said
    assert "default 540" in said


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Outcome("exact", True, RAN, rows=[{"right": True}]), 0),
        (Outcome("exact", True, RAN, rows=[{"right": True}, {"right": False}]), 1),
        (Outcome("exact", True, FAILED, "RuntimeError: no"), 1),
        (Outcome("exact", True, CUT, squeezed=False), 1),
        (Outcome("exact", True, CUT, squeezed=True), 2),
        (Outcome("exact", True, CANNOT, "no such device"), 2),
        (Outcome("exact", True, NO_ACCELERATOR, "none"), 2),
        (Outcome("speed", False, NO_ACCELERATOR, "none"), 2),
        (Outcome("exact", True, INTERRUPTED), 130),
        (Outcome("speed", False, FAILED, "RuntimeError: no"), 0),
        (Outcome("speed", False, CANNOT, "no such device"), 0),
    ],
)
def test_it_ends_with_1_where_an_error_was_found_with_2_where_it_was_not_looked_for(
    tmp_path, monkeypatch, capsys, outcome, code
):
    monkeypatch.setattr(on_device, "run_part", lambda *_: outcome)
    assert on_device.main(["--out", str(tmp_path), "--parts", outcome.name]) == code
    record = json.loads((tmp_path / "summary.json").read_text())
    assert record["error"] is (code == 1)
    assert ("WRONG" in (tmp_path / "summary.md").read_text()) is (code == 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(("not checked to the end: exact (", "nothing was checked: none")) is (code == 2)


def test_a_part_that_does_not_apply_here_is_no_error_where_it_was_not_named(tmp_path, monkeypatch):
    def run(name, *_):
        return Outcome(name, PARTS[name].correctness, CANNOT if name == "pairs" else RAN)

    monkeypatch.setattr(on_device, "run_part", run)
    assert on_device.main(["--out", str(tmp_path)]) == 0
    assert on_device.main(["--out", str(tmp_path), "--parts", "pairs"]) == 2


def test_a_budget_that_is_too_short_for_a_part_is_an_error(tmp_path, capsys):
    assert on_device.main(["--simulated", "4", "--budget", "5", "--out", str(tmp_path)]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not checked to the end: traps (no time left), exact (no time left), tests (no time left)")
    assert last.endswith("give a longer --budget, or name fewer --parts")
    assert json.loads((tmp_path / "summary.json").read_text())["unchecked"][:2] == ["traps", "exact"]


@pytest.mark.rare
def test_ctrl_c_ends_the_part_and_leaves_what_was_found(tmp_path):
    command = [sys.executable, "-m", "benchmarks.on_device", "--simulated", "2", "--out", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--parts", "machine", "traps"], cwd=on_device.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        printed = []
        for line in process.stdout:
            printed.append(line.decode())
            if line.startswith(b"traps begins"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, printed
    assert "Traceback" not in "".join(printed)
    assert printed[-1].startswith("interrupted in traps")
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [part["status"] for part in record["parts"]] == [RAN, INTERRUPTED]
    assert "| traps | interrupted |" in (tmp_path / "summary.md").read_text()


def test_what_comes_late_gets_what_is_left(tmp_path, monkeypatch):
    limits = {}

    def run(name, limit, simulated, out):
        limits[name] = limit
        return Outcome(name, PARTS[name].correctness, RAN)

    monkeypatch.setattr(on_device, "run_part", run)
    monkeypatch.setattr(on_device.time, "monotonic", iter([0.0, 0.0, 180.0, 195.0]).__next__)
    on_device.main(["--out", str(tmp_path), "--budget", "200", "--parts", "traps", "exact", "speed"])
    assert limits == {"traps": PARTS["traps"].seconds, "exact": 20.0}
    assert json.loads((tmp_path / "summary.json").read_text())["parts"][-1]["status"] == NO_TIME


def test_a_part_ends_at_its_limit_with_all_that_it_started(tmp_path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "log.txt"
    assert on_device.ended([sys.executable, "-c", parent], 3.0, log) is None
    pid = int(log.read_text())
    deadline = time.monotonic() + 5
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)
    assert on_device.ended([sys.executable, "-c", "raise SystemExit(7)"], 30.0, log) == 7


def running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_part_that_raises_says_what_and_shows_its_last_lines(tmp_path, monkeypatch):
    def fail(command, limit, log):
        with (tmp_path / "rows.jsonl").open("a") as file:
            print(json.dumps({"part": "speed", "raised": "RuntimeError: out of luck"}), file=file)
            file.write('{"part": "spe')  # ended while it wrote
        with log.open("a") as file:
            file.write("its last line\n")
        return 1

    monkeypatch.setattr(on_device, "ended", fail)
    outcome = on_device.run_part("speed", 10.0, 0, tmp_path)
    assert (outcome.status, outcome.why, outcome.tail) == (FAILED, "RuntimeError: out of luck", ["its last line"])
    assert outcome.rows == [{"raised": "RuntimeError: out of luck"}]


FAILING = """
import pytest

@pytest.fixture
def broken():
    yield
    assert 1 == 3, "nor this"

def test_a():
    pass

def test_b(broken):
    assert 1 == 2, "no"

def test_c(broken):
    pass
"""


def test_failing_tests_are_reported_and_counted_one_by_one(bench, tmp_path):
    path = tmp_path / "test_three.py"
    path.write_text(FAILING)
    correctness.tested(bench, str(path))
    found = [row for row in rows(tmp_path) if "doing" not in row]
    *failed, total = found
    assert [(row["what"].rpartition("::")[2], row.get("right"), row["when"]) for row in failed] == [
        ("test_b", False, "call"),
        ("test_b", None, "teardown"),
        ("test_c", False, "teardown"),
    ]
    assert "no" in failed[0]["why"]
    assert (total["passed"], total["failed"], "right" in total) == (1, 2, False)
    assert on_device.verdict(Outcome("tests", True, RAN, rows=found)) == "2 of 3 WRONG"


def test_no_tests_are_wrong(bench, tmp_path):
    path = tmp_path / "test_none.py"
    path.write_text("")
    correctness.tested(bench, str(path))
    assert rows(tmp_path)[-1]["right"] is False


CRASHING = """
import ctypes, threading

def test_a():
    pass

def test_b():
    threads = [threading.Thread(target=threading.Event().wait, daemon=True) for _ in range(9)]
    for thread in threads:
        thread.start()
    ctypes.string_at(0)
"""


def test_a_crash_of_the_tests_names_signal_and_test_and_shows_how_it_began(tmp_path, monkeypatch):
    (tmp_path / "test_gpu_crashing.py").write_text(CRASHING)
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, sys\n"
        f"sys.path.append({str(on_device.ROOT)!r})\n"
        "from benchmarks.device_parts import correctness\n"
        f"correctness.TESTS = pathlib.Path({str(tmp_path)!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outcome = on_device.run_part("tests", 100.0, 2, tmp_path)
    assert outcome.status == FAILED
    assert outcome.why.startswith("ended by SIGSEGV, in ")
    assert outcome.why.endswith("test_gpu_crashing.py::test_b")
    assert outcome.error
    assert any("Fatal Python error: Segmentation fault" in line for line in outcome.tail[:2])
    assert not any("doing" in row for row in outcome.rows)


def test_a_part_that_is_cut_off_names_what_it_was_in():
    begun = [{"doing": "test_a"}, {"doing": None}, {"doing": "test_b"}]
    assert on_device.ending(None, begun) == (CUT, ", in test_b")
    assert on_device.ending(None, begun[:2]) == (CUT, "")
    assert on_device.ending(1, [*begun, {"raised": "OSError: no"}]) == (FAILED, "OSError: no, in test_b")
    assert on_device.ending(-9, []) == (FAILED, "ended by SIGKILL")
    assert on_device.ending(3, []) == (FAILED, "exit code 3")


def test_a_compiled_cell_that_raises_is_said_to_and_is_not_wrong(bench, monkeypatch):
    def refuse(cell, mode):
        raise AssertionError("no graphs in this thread")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(traps, "needs_graphs", lambda _: None)
    assert traps.compiled_with_graphs(bench) == (False, "raises AssertionError: no graphs in this thread")


def test_bits_apart_are_counted(bench):
    expected = trained(bench, 1, "never", torch.float32)
    assert apart(expected, trained(bench, len(BALANCES), "always", torch.float32))["apart"] == 0
    name = next(iter(expected))
    found = apart(expected, expected | {name: expected[name] + 0.5})
    assert (found["apart"], found["first"]) == (1, name)
    assert found["worst"] == pytest.approx(0.5)


def test_wrong_gradients_are_seen():
    pipe = gpipe.GPipe(torch.nn.Sequential(torch.nn.Linear(2, 2)), [1], devices=["sim:0"])
    pipe(torch.ones(2, 2)).sum().backward()
    right = [p.grad.clone() for p in pipe.parameters()]
    assert not differ(right, pipe)
    assert differ([right[0] + 0.1, right[1]], pipe)


def test_stages_on_streams_of_their_own_compute_the_same_without_races(bench):
    x = torch.randn(2, 8, 4, 64, device=bench.device)
    found, used = [], []
    for streams in ([], [torch.Stream(bench.device) for _ in range(2)]):
        module = encoder(2, 64)
        pipe = gpipe.GPipe(module, [1, 1], devices=[bench.device] * 2, chunks=4, checkpoint="never")
        for cell in module:
            cell.register_forward_hook(lambda *_: used.append(torch.accelerator.current_stream(bench.device)))

        def step(pipe=pipe):
            pipe.zero_grad()
            pipe.train_step(*x, torch.nn.functional.mse_loss, loss_over="micro_batch", schedule="one_f_one_b")

        if streams:
            used.clear()
            with on_streams(streams):
                in_turns(bench, {"step": step}, rounds=1)
            assert set(used) == set(streams)
        else:
            step()
        found.append([p.grad.cpu() for p in pipe.parameters()])
    assert all(map(torch.equal, *found))


def test_a_cell_takes_its_seconds_in_the_actions_they_belong_to():
    cost = StageCost(0.02, 0.05, 0.03)
    pipe = gpipe.GPipe(
        torch.nn.Sequential(overlap.Busy(cost), overlap.Busy(cost)),
        [1, 1],
        devices=["sim:0", "sim:1"],
        chunks=2,
        checkpoint="never",
    )
    x, y = torch.randn(2, overlap.WIDTH, device="sim:0"), torch.randn(2, overlap.WIDTH, device="sim:1")
    with gpipe.record(pipe) as timeline:
        pipe.train_step(x, y, torch.nn.functional.mse_loss, loss_over="micro_batch", schedule="zero_bubble_h1")
    expected = {Kind.FORWARD: 0.02, Kind.INPUT_GRADIENT: 0.05, Kind.WEIGHT_GRADIENT: 0.03}
    for spans in timeline.workers:
        for action, start, end in spans:
            assert end - start == pytest.approx(expected[action.kind], abs=0.008)


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "zero_bubble_h1"])
def test_a_step_is_near_the_simulated_one(schedule):
    case = overlap.Case(2, 4, schedule, even=False, copy=0.004)
    assert case.simulated() < min(overlap.measured(case, rounds=2)) < 1.1 * case.simulated()


def test_the_table_of_steps_beside_the_simulators(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from benchmarks import device_overlap, harness

    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    device_overlap.main(["--stages", "2", "--copies", "0", "--rounds", "1"])
    record = json.loads((tmp_path / "device_overlap.json").read_text())
    (table,) = record["results"]
    assert [row[3] for row in table["rows"]] == ["gpipe", "one_f_one_b", "zero_bubble_h1"] * 2
    assert all(float(row[-1]) > 0.9 for row in table["rows"])
    assert all(len(samples["seconds"]) == 1 for samples in record["samples"].values())
