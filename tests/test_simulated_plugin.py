"""The plug-in of pytest that makes simulated accelerators: whole runs of it, and what it says where it cannot build."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpipe.testing import accelerators
from gpipe.testing.accelerators import build, plugin

pytestmark = pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators: --accelerators")

ROOT = Path(__file__).parent.parent

CONFTEST = """
import torch
torch.zeros((), requires_grad=True).backward()
"""

TESTS = """
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


def test_ends_with_a_race(racing):
    pass


def test_is_told_of_no_others_race():
    assert torch.ones(3, device="sim:1").tolist() == [1, 1, 1]
"""


def run(*command, cwd=None, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in (accelerators.COUNT, accelerators.MEMORY)}
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


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
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
        "ERROR test_races.py::test_ends_with_a_race",
        "PASSED test_races.py::test_is_told_of_no_others_race",
    ):
        assert line in out, out + ended.stderr
    assert "2 failed, 3 passed, 1 error" in out
    found = "(thread MainThread) writes over what aten::fill_ on the default stream of sim:1 (thread MainThread) may"
    assert out.count(found) >= 3
    assert "aten::mul_ on stream 2 of sim:1" in out


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


def refused(**environment):
    ended = run_pytest("--collect-only", str(ROOT / "tests" / "test_public.py"), **environment)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if line)
    return line


def test_without_a_compiler_one_line_says_what_to_install(tmp_path):
    line = refused(PATH=str(tmp_path), CXX="c++", GPIPE_SIMULATED_BUILD=str(tmp_path))
    assert "this machine lacks a C++ compiler, c++ (install g++), ninja (pip install ninja)" in line


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


def test_wrong_arguments():
    with pytest.raises(Exception, match="expected a size such as 16GiB or 500MiB, was given much"):
        plugin._bytes("much")
    assert plugin._bytes("1.5GiB") == 3 * 2**29
    assert plugin._bytes("1000") == 1000


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
    accelerators.start(2)
except RuntimeError as error:
    print(error)
"""
    ended = run("-c", program)
    assert "autograd has run in this process before its simulated accelerators were started" in ended.stdout, (
        ended.stderr
    )


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
