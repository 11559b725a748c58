import gc
import threading
import time

import pytest
import torch

torch.set_num_threads(1)  # results depend on the number of intra-op threads


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("gpipe-worker")]


@pytest.fixture(autouse=True)
def no_leaked_workers():
    before = set(workers())
    yield
    if set(workers()) - before:
        gc.collect()  # frames of a caught exception may have held the pipe in a cycle
    deadline = time.monotonic() + 5
    while (left := set(workers()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, f"leaked threads: {sorted(t.name for t in left)}"
