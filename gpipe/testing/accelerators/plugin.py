"""A pytest plug-in: simulated accelerators for a run of tests, whose race detector fails the tests that race."""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator
from typing import Any, NoReturn

import pytest
import torch

from gpipe.testing import accelerators
from gpipe.testing.accelerators.left_reports import LeftReports

_RACES = pytest.StashKey[str]()
"""What a test's call was found to do, or the end of the whole run."""

_LEFT = pytest.StashKey[LeftReports]()
_FOUND = "the race detector of the simulated accelerators found:\n"
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _bytes(text: str) -> int:
    number, unit = (text[:-3], text[-3:]) if text[-3:] in _UNITS else (text, "")
    try:
        size = float(number) * _UNITS.get(unit, 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size such as 16GiB or 500MiB, was given {text}") from None
    if not 1 <= size <= accelerators.LARGEST:
        raise argparse.ArgumentTypeError(f"expected a size of 1 to {accelerators.LARGEST} bytes, was given {text}")
    return int(size)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--accelerators`` and ``--accelerator-memory``."""
    group = parser.getgroup("simulated accelerators")
    group.addoption("--accelerators", type=int, metavar="N", help="how many simulated accelerators (default: 4)")
    group.addoption("--accelerator-memory", type=_bytes, metavar="SIZE", help="of each of them (default: 16GiB)")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Start them before a conftest.py may start the threads of autograd."""
    _start(early_config, early_config.known_args_namespace)
    _set_plugins_of_processes([])  # those that a worker's tests start are not its workers


def pytest_configure(config: pytest.Config) -> None:
    """Start them where a conftest.py has named this plug-in."""
    _start(config, config.option)


def _start(config: pytest.Config, options: argparse.Namespace) -> None:
    if _LEFT in config.stash or options.help or options.version:
        return
    if not accelerators.started():
        try:
            accelerators.start(options.accelerators, options.accelerator_memory)
        except (RuntimeError, ValueError) as error:
            raise pytest.UsageError(str(error)) from None
    config.stash[_LEFT] = LeftReports()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder of what processes leave."""
    if _LEFT in config.stash:
        config.stash[_LEFT].close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Let the workers of pytest-xdist load this plug-in before a conftest.py too: they read ``-p`` after it."""
    _set_plugins_of_processes([__name__])


def _set_plugins_of_processes(own: list[str]) -> None:
    others = [name for name in os.environ.get("PYTEST_PLUGINS", "").split(",") if name and name != __name__]
    if others or own:
        os.environ["PYTEST_PLUGINS"] = ",".join([*others, *own])
    else:
        os.environ.pop("PYTEST_PLUGINS", None)


def pytest_report_header() -> list[str]:
    """What the tests run on."""
    count = torch.accelerator.device_count()
    size = torch.accelerator.get_memory_info(0)[1]
    unit = "GiB" if size >= 2**30 else "MiB"
    each = f"of {size / _UNITS[unit]:g} {unit} each"
    lines = [f"simulated accelerators: sim:0 to sim:{count - 1} {each}; races fail the tests that make them"]
    if torch.cuda.is_available():
        lines.append("simulated accelerators: this machine's CUDA devices are beside them; torch.accelerator means sim")
    return lines


# --- every report fails the test that made it -------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    """Begin without reports."""
    accelerators.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail a test that raced; where it has failed anyway, say so too."""
    try:
        result = yield
    except BaseException:
        if found := _taken(item.config):
            item.stash[_RACES] = found
            item.add_report_section("call", "race detector", found)
        raise
    if found := _taken(item.config):
        item.stash[_RACES] = found
        _fail(found)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that raced before it was skipped."""
    report = yield
    if report.when == "call" and report.skipped and not hasattr(report, "wasxfail") and _RACES in item.stash:
        report.outcome, report.longrepr = "failed", _FOUND + item.stash[_RACES]
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    """Fail fixtures that raced, and undo what a test has set."""
    try:
        result = yield
    finally:
        found = _taken(item.config)
        accelerators.reset()
    if found:
        _fail(found)
    return result


def _taken(config: pytest.Config) -> str:
    found = [*accelerators.reports(), *config.stash[_LEFT].take()]
    accelerators.clear()
    return "\n".join(found)


def _fail(found: str) -> NoReturn:
    pytest.fail(_FOUND + found, pytrace=False)


# --- what processes leave that end after the last test ----------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for what was left since the last test, of a worker of pytest-xdist by way of its controller."""
    config = session.config
    if _LEFT in config.stash:
        _note(config, "\n".join(config.stash[_LEFT].take()))
    if found := config.stash.get(_RACES, ""):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        if hasattr(config, "workeroutput"):
            config.workeroutput[__name__] = found


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist found at its end."""
    _note(node.config, getattr(node, "workeroutput", {}).get(__name__, ""))


def _note(config: pytest.Config, found: str) -> None:
    config.stash[_RACES] = "\n".join(filter(None, [config.stash.get(_RACES, ""), found]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say why the run fails where no test does."""
    if found := config.stash.get(_RACES, ""):
        terminalreporter.section("left by processes that ended after the last test", red=True)
        terminalreporter.write_line(_FOUND + found)
