"""Parts that look for errors: the machine, bits of every division, the device tests, ranks."""

from __future__ import annotations

import os
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import gpipe
from benchmarks.device_parts.bench import Bench, CannotRun, encoder, part
from gpipe.testing.accelerators import plugin

TESTS = Path(__file__).parents[2] / "tests"


@part(30)
def machine(bench: Bench) -> None:
    """What this is run on: device, driver, versions."""
    found: dict[str, Any] = {"device": str(bench.device), "count": torch.accelerator.device_count()}
    if bench.device.type == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found |= {"name": facts.name, "multiprocessors": facts.multi_processor_count, "bytes": facts.total_memory}
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    bench.say(**found, torch=torch.__version__, python=platform.python_version(), cores=os.cpu_count())


# --- bits -------------------------------------------------------------------------------------------------------------

BALANCES = {1: [4], 2: [2, 2], 3: [1, 1, 2], 4: [1, 1, 1, 1]}


def trained(bench: Bench, stages: int, checkpoint: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What three steps of AdamW leave of a net with dropout, all of its stages on one device."""
    width = bench.size(256, 64)
    devices = [bench.device] * stages
    pipe = gpipe.GPipe(
        encoder(4, width, dropout=0.1), BALANCES[stages], devices=devices, chunks=4, checkpoint=checkpoint, seed=3
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), 1e-3)
    x = torch.randn(13, bench.size(128, 8), width, generator=torch.Generator().manual_seed(1)).to(bench.device)
    for _ in range(3):
        optimizer.zero_grad()
        with bench.autocast(dtype):
            y = pipe(x)
        y.float().square().mean().backward()
        optimizer.step()
    return {name: value.cpu() for name, value in pipe.state_dict().items()}


def apart(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Any]:
    """How many tensors have other bits, and by how much at most."""
    names = [name for name in expected if not torch.equal(expected[name], found[name])]
    worst = max(((expected[name].double() - found[name].double()).abs().max().item() for name in names), default=0.0)
    return {"apart": len(names), "tensors": len(expected), "worst": worst, "first": (names or [""])[0]}


@part(75, correctness=True)
def exact(bench: Bench) -> None:
    """Bits after three steps, dropout on: K = 1 to 4 on one device, every checkpoint mode, float32 and bfloat16.

    Without deterministic algorithms nothing is promised; what differs then is reported all the same.
    """
    for deterministic in bench.size((True, False), (True,)):  # a CPU's kernels are
        torch.use_deterministic_algorithms(deterministic)
        for dtype in (torch.float32, torch.bfloat16):
            expected = trained(bench, 1, "never", dtype)
            for stages in BALANCES:
                found = {
                    c: apart(expected, trained(bench, stages, c, dtype)) for c in ("never", "always", "except_last")
                }
                mode, worst = max(found.items(), key=lambda each: int(each[1]["apart"]))
                right = {"right": not worst["apart"]} if deterministic else {}
                what = "bits as those of one stage that recomputes nothing"
                where = {"deterministic": deterministic, "dtype": str(dtype), "K": stages}
                bench.say(what=what, **right, **where, modes=len(found), worst_mode=mode, **worst)
    races = bench.races()
    bench.check("no races", not races, races=races[:3])


# --- the device tests -------------------------------------------------------------------------------------------------


class Outcomes:
    """A pytest plugin that reports a test that fails as soon as it does, and counts the rest."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._passed: set[str] = set()
        self._failed: set[str] = set()
        self.skipped: Counter[str] = Counter()

    @property
    def counts(self) -> dict[str, int]:
        """Of tests: those ``passed`` and ``skipped``, and those ``failed``, which have a row each."""
        passed, failed = len(self._passed - self._failed), len(self._failed)
        return {"passed": passed, "failed": failed, "skipped": self.skipped.total()}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """A test begins."""
        self._bench.begin(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        """It is over."""
        self._bench.begin(None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        if report.failed:
            lines = report.longreprtext.strip().splitlines()
            why = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1] if lines else "")
            self._fail(report.nodeid, report.when, why[:300])
        elif report.skipped:
            self.skipped[str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]] += 1
        elif report.when == "call":
            self._passed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be imported."""
        if report.failed:
            self._fail(report.nodeid, "collection", report.longreprtext.strip()[-300:])

    def _fail(self, nodeid: str, when: str | None, why: str) -> None:
        again = nodeid in self._failed  # its fixtures too
        self._failed.add(nodeid)
        self._bench.say(what=nodeid, **({} if again else {"right": False}), when=when, why=why)


def tested(bench: Bench, *arguments: str) -> None:
    """Run pytest in this process, which has the accelerators already, and report."""
    outcomes = Outcomes(bench)
    plugins, devices = ([plugin], ["--accelerators", str(bench.simulated)]) if bench.simulated else ([], [])
    options = ["-v", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={TESTS.parent}"]
    code = pytest.main([*devices, *options, *arguments], plugins=[outcomes, *plugins])
    for why, count in outcomes.skipped.items():
        bench.say(what="skipped", count=count, why=why.removeprefix("Skipped: "))
    what, counts = "pytest " + " ".join(map(os.path.basename, arguments)), outcomes.counts
    bench.say(what=what, **counts, exit_code=int(code))  # no check: its tests are
    if not counts["failed"] and (code != pytest.ExitCode.OK or not counts["passed"]):
        bench.check("tests are found, and pytest runs to its end", False, exit_code=int(code))


@part(170, correctness=True)
def tests(bench: Bench) -> None:
    """tests/test_gpu*.py on these devices; two ranks that share a device through gloo are among them."""
    tested(bench, *map(str, sorted(TESTS.glob("test_gpu*.py"))))


# --- ranks and several devices ----------------------------------------------------------------------------------------


@part(40, correctness=True)
def world_of_one(bench: Bench) -> None:
    """A world of one rank, over NCCL where there is CUDA: it comes up, and its bits are those of threads."""
    backend = "cpu:gloo,cuda:nccl" if bench.device.type == "cuda" else "gloo"
    for library in ("GLOO", "NCCL"):  # a machine's own name may not be known
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    torch.use_deterministic_algorithms(True)
    x, mse = torch.randn(4, 8, 64), nn.functional.mse_loss
    options: dict[str, Any] = {"chunks": 2, "seed": 3}
    ranks = gpipe.DistributedGPipe(encoder(2, 64), loss_fn=mse, loss_over="micro_batch", device=bench.device, **options)
    threads = gpipe.GPipe(encoder(2, 64), [1, 1], devices=[bench.device] * 2, **options)
    losses = [ranks.train_step(x, x).cpu(), threads.train_step(x, x, mse, loss_over="micro_batch").cpu()]
    pairs = zip(ranks.parameters(), threads.parameters(), strict=True)
    same = torch.equal(*losses) and all(torch.equal(p.grad.cpu(), q.grad.cpu()) for p, q in pairs)
    bench.check(
        "loss and gradients as those of threads", same, backend=dist.get_backend_config(), loss=losses[0].item()
    )
    dist.destroy_process_group()


@part(90, correctness=True)
def pairs(bench: Bench) -> None:
    """Copies between every two devices bring what was sent; over NCCL the tests of ranks in the order it recommends."""
    count = torch.accelerator.device_count()
    if count < 2:
        raise CannotRun(f"needs two accelerators or more, this machine has {count}")
    kind = bench.device.type
    pattern = torch.arange(1, 2**16 + 1, dtype=torch.int32)
    for a in range(count):
        sent = pattern.to(f"{kind}:{a}")
        got = {b: sent.to(f"{kind}:{b}").cpu() for b in range(count) if b != a}
        wrong = [b for b, values in got.items() if not torch.equal(values, pattern)]
        bench.check("copies bring what was sent", not wrong, source=a, wrong_at=wrong)
    if kind == "cuda" and dist.is_nccl_available():
        os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] = "1"  # NCCL ends a process whose threads race to launch
        tested(bench, *map(str, sorted(TESTS.glob("test_gpu*.py"))), "-k", "nccl")
