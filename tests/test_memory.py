"""What a pipe holds, and when it lets go."""

import gc
import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from nets import linears, make_pipe
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import gpipe.minibatch
from gpipe.gradients import collected

ROWS, WIDTH, CHUNKS = 8, 16, 4
BOUNDARY = ROWS // CHUNKS * WIDTH * 4  # bytes of one micro-batch


class Ledger:
    """Bytes of the tensors that the graphs of each stage hold now, and the most they ever held."""

    def __init__(self):
        self.live, self.peak = Counter(), Counter()
        self._lock = threading.Lock()

    def book(self, stage, size):
        with self._lock:
            self.live[stage] += size
            self.peak[stage] = max(self.peak[stage], self.live[stage])


class Held:
    """A tensor in the books as long as a graph holds it."""

    def __init__(self, ledger, stage, tensor):
        self.tensor, self._entry = tensor.detach(), (ledger, stage, tensor.nbytes)
        ledger.book(stage, tensor.nbytes)

    def __del__(self):
        ledger, stage, size = self._entry
        ledger.book(stage, -size)


class Booked(nn.Module):
    """A cell that saves two activations of the size of a boundary, and books them."""

    def __init__(self, ledger, stage):
        super().__init__()
        self.ledger, self.stage = ledger, stage
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.linear(x)
        with saved_tensors_hooks(lambda t: Held(self.ledger, self.stage, t), lambda held: held.tensor):
            return y.tanh().sigmoid()


ONE = 2 * 2 * BOUNDARY  # bytes that a micro-batch's activations take in a stage of two cells


def booked_pipe(keep, stages=3):
    ledger = Ledger()
    module = nn.Sequential(*(Booked(ledger, k) for k in range(stages) for _ in range(2)))
    return make_pipe(module, [2] * stages, CHUNKS, keep), ledger


@contextmanager
def reference_counting_alone():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("keep", [0, 1, 2, CHUNKS])
def test_a_stage_holds_the_activations_it_keeps_and_one_micro_batch_while_it_recomputes(keep):
    with reference_counting_alone():
        pipe, ledger = booked_pipe(keep)
        loss = pipe(torch.randn(ROWS, WIDTH)).sum()
        assert ledger.live == dict.fromkeys(range(3), keep * ONE)
        loss.backward()
        assert ledger.live == dict.fromkeys(range(3), 0)
        assert ledger.peak == dict.fromkeys(range(3), max(keep, 1) * ONE)


def test_keep_by_stage():
    pipe, ledger = booked_pipe((0, 2, 4))
    loss = pipe(torch.randn(ROWS, WIDTH)).sum()
    assert [ledger.live[k] for k in range(3)] == [0, 2 * ONE, 4 * ONE]
    loss.backward()
    assert not any(ledger.live.values())


def test_without_gradients_nothing_is_held():
    pipe, ledger = booked_pipe(CHUNKS)
    with torch.no_grad():
        pipe(torch.randn(ROWS, WIDTH))
    assert not any(ledger.peak.values())


def test_train_step_over_micro_batches_holds_no_more():
    pipe, ledger = booked_pipe(0)
    x, y = torch.randn(2, ROWS, WIDTH)
    pipe.train_step(x, y, nn.functional.mse_loss, "micro_batch")
    assert ledger.peak == dict.fromkeys(range(3), ONE)
    assert not any(ledger.live.values())


def python_tensor_bytes(besides):
    """Bytes of all memory that tensors known to Python share, each piece once, but for that of ``besides``."""
    pieces = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            pieces[storage.data_ptr()] = storage.nbytes()
    for tensor in besides:
        pieces.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(pieces.values())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_between_forward_and_backward_one_boundary_per_stage_and_micro_batch_is_held(stages):
    x = torch.randn(ROWS, WIDTH)
    gc.collect()
    before = python_tensor_bytes([x])
    pipe, ledger = booked_pipe(0, stages)
    y = pipe(x)
    output = 64  # a copy may start within its memory so as to be aligned as the original
    held = python_tensor_bytes([x, y]) - before
    assert ledger.live == dict.fromkeys(range(stages), 0)
    assert stages * CHUNKS * BOUNDARY <= held <= stages * CHUNKS * (BOUNDARY + output)
    y.sum().backward()
    gc.collect()
    grads = [p.grad for p in pipe.parameters()]
    assert python_tensor_bytes([x, y, *grads]) - before <= 64


@pytest.mark.parametrize("keep", ["always", "except_last", "never"])
def test_dropping_the_output_frees_everything(keep):
    with reference_counting_alone():
        pipe, ledger = booked_pipe(keep)
        before = python_tensor_bytes([])
        for _ in range(2):
            y = pipe(torch.randn(ROWS, WIDTH))
            assert y.requires_grad
        del y
        assert not any(ledger.live.values())
        assert python_tensor_bytes([]) == before


@pytest.mark.parametrize("keep", ["always", "never"])
def test_backward_frees_although_the_loss_lives_on(keep):
    with reference_counting_alone():
        pipe, ledger = booked_pipe(keep)
        loss = pipe(torch.randn(ROWS, WIDTH)).sum()
        loss.backward(retain_graph=True)
        assert any(ledger.live.values()) == (keep == "never")
        loss.backward()
        assert not any(ledger.live.values())


def test_training_makes_no_cycles_of_tensors():
    with reference_counting_alone():
        pipe, _ = booked_pipe("except_last")
        for step in range(3):
            if step == 1:
                gc.collect()  # torch has loaded by now what it loads when first used
                gc.set_debug(gc.DEBUG_SAVEALL)
            pipe(torch.randn(ROWS, WIDTH)).sum().backward()
            pipe.train_step(torch.randn(ROWS, WIDTH), None, lambda output, target: output.mean(), "micro_batch")
        gc.collect()
        kinds = {type(thing) for thing in gc.garbage}
        gc.set_debug(0)
        gc.garbage.clear()
    assert not [kind for kind in kinds if issubclass(kind, torch.Tensor) or kind.__module__.startswith("gpipe")]


def test_the_gradient_is_handed_over_not_copied(monkeypatch):
    handed = []

    @contextmanager
    def spying(parameters):
        with collected(parameters) as totals:
            yield totals
        handed.extend(total.data_ptr() for total in totals)

    monkeypatch.setattr(gpipe.minibatch, "collected", spying)
    module = linears()
    make_pipe(module)(torch.ones(6, 4)).sum().backward()
    assert [p.grad.data_ptr() for p in module.parameters()] == handed
