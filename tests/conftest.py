import gc
import os
import time

import pytest
import torch
from nets import workers

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its bits with this alone
torch.set_num_threads(1)  # results depend on the number of intra-op threads
torch.zeros((), requires_grad=True).backward()  # an engine that starts after a fake tensor does not work in forks


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Files with slow tests first: at the end the other workers would wait for whoever has one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("rare")}
    items.sort(key=lambda item: item.path not in slow)


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def no_leaked_workers(request):
    before = set(workers())
    yield
    if request.node.stash.get(_failed, False):
        return  # the traceback holds the pipe
    if set(workers()) - before:
        gc.collect()  # frames of a caught exception may have held the pipe in a cycle
    deadline = time.monotonic() + 5
    while (left := set(workers()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"leaked threads: {sorted(t.name for t in left)}"
