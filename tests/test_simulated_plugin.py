"""The plug-in of pytest that makes simulated accelerators: whole runs of it, and what it says where it cannot build."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpipe.testing import accelerators
from gpipe.testing.accelerators import build, left_reports, plugin

pytestmark = pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators: --accelerators")

ROOT = Path(__file__).parent.parent
XDIST = pytest.param(["-n", "2"], marks=pytest.mark.rare)

CONFTEST = """
import torch
torch.zeros((), requires_grad=True).backward()
"""

TESTS = """
import unittest

import pytest
import torch
from gpipe.testing import accelerators


@pytest.fixture
def racing():
    yield
    race()


def race():
    x = torch.ones(3, device="sim:1")
    stream = torch.Stream("sim:1")
    with stream:
        x.mul_(2)


def test_there_are_two():
    assert torch.accelerator.device_count() == 2
    assert torch.accelerator.get_memory_info(1)[1] == 2**20
    accelerators.set_capacity(1, 5)


def test_races():
    race()


def test_fails_and_races():
    race()
    raise ValueError("on its own account")


def test_skips_after_a_race():
    race()
    pytest.skip("in vain")


class TestOfUnittest(unittest.TestCase):
    def test_skips_after_a_race(self):
        race()
        self.skipTest("in vain")


@pytest.mark.xfail(strict=True)
def test_is_expected_to_race():
    race()


def test_is_skipped():
    pytest.skip("without a race")


def test_ends_with_a_race(racing):
    pass


def test_is_told_of_no_others_race():
    assert torch.ones(3, device="sim:1").tolist() == [1, 1, 1]
"""


OF_THIS_RUN = (accelerators.COUNT, accelerators.MEMORY, left_reports.FOLDER)


def run(*command, cwd=None, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in OF_THIS_RUN}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_pytest(*arguments, **environment):
    return run("-m", "pytest", "-p", "gpipe.testing.accelerators", "-p", "no:cacheprovider", *arguments, **environment)


@pytest.mark.parametrize("workers", [[], XDIST], ids=["one process", "xdist"])
def test_every_report_fails_the_test_that_made_it(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_races.py").write_text(TESTS)
    settings = ["--rootdir", str(tmp_path), "--accelerators", "2", "--accelerator-memory", "1MiB", "-rA"]
    ended = run_pytest(*settings, *workers, cwd=tmp_path)
    out = ended.stdout
    assert "simulated accelerators: sim:0 to sim:1 of 1 MiB each" in out
    for line in (
        "PASSED test_races.py::test_there_are_two",
        "FAILED test_races.py::test_races",
        "FAILED test_races.py::test_fails_and_races - ValueError: on its own account",
        "FAILED test_races.py::test_skips_after_a_race",
        "FAILED test_races.py::TestOfUnittest::test_skips_after_a_race",
        "XFAIL test_races.py::test_is_expected_to_race",
        "ERROR test_races.py::test_ends_with_a_race",
        "PASSED test_races.py::test_is_told_of_no_others_race",
    ):
        assert line in out, out + ended.stderr
    assert "4 failed, 3 passed, 1 skipped, 1 xfailed, 1 error" in out
    found = "(thread MainThread) writes over what aten::fill_ on the default stream of sim:1 (thread MainThread) may"
    assert out.count(found) >= 3
    assert "aten::mul_ on stream 2 of sim:1" in out


@pytest.mark.rare
def test_it_may_be_named_by_a_conftest(tmp_path):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["gpipe.testing.accelerators"]')
    (tmp_path / "test_races.py").write_text(TESTS)
    settings = ["-m", "pytest", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", "test_races.py::test_races"]
    out = run(*settings, cwd=tmp_path, GPIPE_SIMULATED_ACCELERATORS="2").stdout
    assert "1 failed in" in out, out
    (tmp_path / "conftest.py").write_text(CONFTEST + 'pytest_plugins = ["gpipe.testing.accelerators"]')
    ended = run(*settings, cwd=tmp_path)
    assert "call start() before the first backward (in pytest: -p gpipe.testing.accelerators)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_page_prints_what_it_says():
    page = (ROOT / "docs" / "simulated_accelerators.md").read_text()
    program, printed = page.split("## In a program")[1].split("prints\n")
    program = "\n".join(line.removeprefix("    ") for line in program.splitlines() if line.startswith("    "))
    printed = next(line.strip() for line in printed.splitlines() if line.startswith("    "))
    assert run("-c", program).stdout.strip() == printed


# --- races of processes that tests start ------------------------------------------------------------------------------

PROCESSES = """
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from gpipe.testing import accelerators


def work(how="races"):
    accelerators.start()
    if how == "is late":
        time.sleep(1)
    x = torch.ones(3, device="sim:1")
    with torch.Stream("sim:1"):
        x.mul_(2)
    del x
    if how == "knows":
        assert len(accelerators.reports()) == 2
        accelerators.clear()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("how", ["races", "knows"])
def test_multiprocessing(method, how):
    process = multiprocessing.get_context(method).Process(target=work, args=(how,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_subprocess():
    subprocess.run([sys.executable, "-c", "import test_processes; test_processes.work()"], check=True)


def test_torch():
    torch.multiprocessing.spawn(work_of_rank, nprocs=2)


def work_of_rank(rank):
    work()


def test_forks_after_a_race_of_its_own():
    work()
    process = multiprocessing.get_context("fork").Process(target=print)
    process.start()
    accelerators.clear()
    process.join()


def test_leaves_a_process_behind():
    os.environ["LEFT_BEHIND"] = "1"
    subprocess.Popen([sys.executable, "-c", "import test_processes; test_processes.work('is late')"])
"""

WAITING = """
import os
import time


def pytest_sessionfinish():
    deadline = time.monotonic() + 60 * ("LEFT_BEHIND" in os.environ)  # not in workers that ran no test
    while not os.listdir(os.environ["GPIPE_SIMULATED_REPORTS"]) and time.monotonic() < deadline:
        time.sleep(0.05)
"""


def run_processes(folder, *arguments):
    (folder / "test_processes.py").write_text(PROCESSES)
    settings = ["--rootdir", str(folder), "--accelerators", "2", "-rA", "test_processes.py"]
    return run_pytest(*settings, *arguments, cwd=folder, PYTHONPATH=f"{ROOT}{os.pathsep}{folder}")


@pytest.mark.rare
def test_races_of_processes_fail_the_test_that_started_them(tmp_path):
    ended = run_processes(tmp_path, "-k", "not behind")
    out = ended.stdout
    for method in ("fork", "spawn", "forkserver"):
        assert f"FAILED test_processes.py::test_multiprocessing[races-{method}]" in out, out + ended.stderr
        assert f"PASSED test_processes.py::test_multiprocessing[knows-{method}]" in out, out + ended.stderr
    for line in ("FAILED test_processes.py::test_subprocess", "FAILED test_processes.py::test_torch"):
        assert line in out, out + ended.stderr
    assert "PASSED test_processes.py::test_forks_after_a_race_of_its_own" in out, out + ended.stderr
    reports = {line for line in out.splitlines() if line.startswith("process ") and "writes over" in line}
    assert len(reports) == 6, reports


@pytest.mark.parametrize("workers", [[], XDIST], ids=["one process", "xdist"])
def test_races_of_processes_that_end_after_the_last_test_fail_the_run(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(WAITING)
    ended = run_processes(tmp_path, "-k", "behind", *workers)
    assert "1 passed" in ended.stdout, ended.stdout + ended.stderr
    assert "left by processes that ended after the last test" in ended.stdout
    assert "aten::mul_ on stream" in ended.stdout
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize("waits", [True, pytest.param(False, marks=pytest.mark.rare)])
def test_the_pages_ranks(tmp_path, waits):
    page = (ROOT / "docs" / "simulated_accelerators.md").read_text().split("## Ranks")[1].split("Start them")[0]
    program = "\n".join(line.removeprefix("    ") for line in page.splitlines() if line.startswith("    "))
    assert "    work.wait()\n" in program
    (tmp_path / "test_ranks.py").write_text(program if waits else program.replace("    work.wait()\n", ""))
    ended = run_pytest("--rootdir", str(tmp_path), "--accelerators", "2", "test_ranks.py", cwd=tmp_path)
    assert ("1 passed" if waits else "1 failed") in ended.stdout, ended.stdout + ended.stderr
    assert waits or "may not have written yet" in ended.stdout


# --- what cannot be started -------------------------------------------------------------------------------------------


def refused(**environment):
    ended = run_pytest("--collect-only", str(ROOT / "tests" / "test_public.py"), **environment)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line)
    return line


def test_without_a_compiler_one_line_says_what_to_install(tmp_path):
    line = refused(PATH=str(tmp_path), CXX="c++ -w", GPIPE_SIMULATED_BUILD=str(tmp_path))
    assert "this machine lacks a C++ compiler, c++ (install g++)" in line


def test_ninja_is_looked_for_beside_this_python_too(tmp_path, monkeypatch):
    (tmp_path / "scripts").mkdir()
    path = str(tmp_path)
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: {"scripts": str(tmp_path / "scripts")}.get(name, "/"))
    monkeypatch.setattr(build, "_build", lambda folder: build.shutil.which("ninja"))
    with pytest.raises(build.BuildError, match=r"lacks ninja \(pip install ninja\), the headers of Python"):
        build._loaded(tmp_path / "key")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / ("scripts" * (name == "scripts"))))
    (tmp_path / "scripts" / "ninja").touch(0o755)
    assert build._loaded(tmp_path / "key") == str(tmp_path / "scripts" / "ninja")
    assert os.environ["PATH"] == path
    monkeypatch.delenv("PATH")
    build._loaded(tmp_path / "key")
    assert "PATH" not in os.environ


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    line = refused(GPIPE_SIMULATED_BUILD=str(tmp_path / "file" / "cache"))
    assert "cannot be built in" in line
    assert "name a folder that can be written in the environment variable GPIPE_SIMULATED_BUILD" in line


def test_a_compiler_that_fails(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-c*) echo "x.cpp:1: error: all is lost"; exit 1;; *) exec c++ "$@";; esac'
    )
    compiler.chmod(0o755)
    line = refused(CXX=str(compiler), GPIPE_SIMULATED_BUILD=str(tmp_path))
    assert "could not be built, all of it in" in line
    assert "x.cpp:1: error: all is lost" in line
    (log,) = tmp_path.glob("*.log")
    assert "all is lost" in log.read_text()


def test_a_compiler_that_does_not_run(tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexit 3")
    compiler.chmod(0o755)
    assert "could not be built, all of it in" in refused(CXX=str(compiler), GPIPE_SIMULATED_BUILD=str(tmp_path))
    compiler.write_text("#!/no/such/shell")
    assert "could not be built, all of it in" in refused(CXX=str(compiler), GPIPE_SIMULATED_BUILD=str(tmp_path))


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("said -m64 'two words'", "-m64 two words"), ("ccache said", ""), ("sccache said -m64", "-m64"), ("said", "")],
)
def test_a_compiler_of_several_words(tmp_path, monkeypatch, command, arguments):
    for name in ("said", "ninja"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CXX", command)

    def compiled(folder):
        return subprocess.run([os.environ["CXX"], "x.cpp"], check=True, capture_output=True, text=True).stdout

    monkeypatch.setattr(build, "_compiled", compiled)
    assert build._loaded(tmp_path / "key").strip() == f"{arguments} x.cpp".strip()
    assert os.environ["CXX"] == command


@pytest.mark.parametrize("command", ["", "'c++", "ccache none"])
def test_a_compiler_that_is_none(monkeypatch, command):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(build.BuildError, match="lacks a C"):
        build._refuse_what_is_missing()


def test_wrong_arguments():
    with pytest.raises(Exception, match="expected a size such as 16GiB or 500MiB, was given much"):
        plugin._bytes("much")
    for text in ("infGiB", "nan", "1e30GiB", "0.1", "0", "-1GiB"):
        with pytest.raises(Exception, match=f"expected a size of 1 to 9223372036854775807 bytes, was given {text}"):
            plugin._bytes(text)
    assert plugin._bytes("1.5GiB") == 3 * 2**29
    assert plugin._bytes("1000") == 1000


def test_help_needs_no_compiler(tmp_path):
    ended = run_pytest("--help", PATH=str(tmp_path), CXX="none", GPIPE_SIMULATED_BUILD=str(tmp_path))
    assert "--accelerator-memory" in ended.stdout, ended.stderr
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("count", "memory"), [(128, 2**20), (1000, 2**20), (0, 2**20), (2, 0), (2, 2**63)], ids=lambda number: str(number)
)
def test_devices_that_cannot_be(count, memory):
    with pytest.raises(
        ValueError, match=f"expected 1 to 127 devices of 1 to .*, was given {count} devices of {memory}"
    ):
        accelerators.start(count, memory)


@pytest.mark.parametrize("variable", [accelerators.COUNT, accelerators.MEMORY])
def test_an_environment_variable_without_a_number(monkeypatch, variable):
    monkeypatch.setenv(variable, "four")
    with pytest.raises(ValueError, match=f"expected a whole number in the environment variable {variable}, was given"):
        accelerators.start()


def test_many_devices_of_a_byte():
    program = """
import torch
from gpipe.testing import accelerators
accelerators.start(127, 1)
try:
    torch.ones(1, device="sim:126")
except torch.OutOfMemoryError:
    print(torch.accelerator.device_count(), torch.accelerator.get_memory_info(126))
"""
    ended = run("-c", program)
    assert ended.stdout.strip() == "127 (1, 1)", ended.stderr


def test_without_the_plugin_nothing_of_it_is_loaded_and_a_late_start_is_refused():
    program = """
import sys
import torch
import gpipe
assert not any(name.startswith("gpipe.testing.accelerators") for name in sys.modules)
from gpipe.testing import accelerators
assert "pytest" not in sys.modules
assert not accelerators.started() and not torch.accelerator.is_available()
try:
    accelerators.reports()
except RuntimeError as error:
    assert "call gpipe.testing.accelerators.start() first" in str(error)
torch.zeros((), requires_grad=True).backward()
try:
    accelerators.reset()
except RuntimeError as error:
    assert "call gpipe.testing.accelerators.start() first" in str(error)
for _ in range(2):
    try:
        accelerators.start(2)
    except RuntimeError as error:
        print(error)
try:
    accelerators.reset()
except RuntimeError as error:
    assert "call gpipe.testing.accelerators.start() first" in str(error)
"""
    ended = run("-c", program)
    said = "autograd has run in this process before its simulated accelerators were started"
    assert ended.stdout.count(said) == 2, ended.stdout + ended.stderr
    assert not ended.stderr


def test_processes_that_build_at_once_build_once(tmp_path, monkeypatch):
    built = []

    def compiled(folder):
        time.sleep(0.1)
        (folder / "part").touch()
        built.append(folder)
        return "built"

    monkeypatch.setattr(build, "_compiled", compiled)
    monkeypatch.setattr(build, "_imported", lambda folder: "imported" if (folder / "part").exists() else "missing")
    found = []
    threads = [threading.Thread(target=lambda: found.append(build._loaded(tmp_path / "key"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["built", "imported", "imported"]
    assert len(built) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]
