"""Failure is loud, prompt and located; the pipe is usable again afterwards."""

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from nets import Apply, Bomb, PlainLoop, assert_same, gradients, linears, make_pipe, workers
from torch import nn

needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.accelerator.is_available(), reason="autograd does not fork here"
)
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("phase", ["forward", "recompute", "backward"])
@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_a_cell_raises_reaches_the_caller_and_the_pipe_goes_on(error, phase, place):
    def make():
        torch.manual_seed(1)
        cells = [nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)]
        cells[place] = Bomb()
        return nn.Sequential(*cells, nn.Dropout(0.5))

    module, plain = make(), PlainLoop(make(), 4)
    pipe = make_pipe(module, [1, 1, 2], chunks=4, checkpoint="always")
    x = torch.randn(8, 4)
    for run in (pipe, plain):
        run(x).square().sum().backward()
    before = gradients(module)
    state = torch.get_rng_state()

    raised = error("boom")
    module[place].arm(raised, phase, calls=2)
    with pytest.raises(error, match="boom") as caught:
        pipe(x).square().sum().backward()
    assert caught.value is raised
    (note,) = raised.__notes__
    raised.__traceback__ = None  # which holds this frame, and the pipe in it
    del caught
    kind, m = {"forward": ("F", 1), "recompute": ("R", 2), "backward": ("B", 2)}[phase]
    last = 3 if place == 2 else place
    cell = "" if phase == "backward" else rf", cell {place} \(Bomb\)"
    stage = rf"stage {place} \(cells {place} to {last}, cpu\)"
    assert re.fullmatch(rf"gpipe: raised in {stage}{cell}, micro-batch {m}, action {place}{kind}{m}", note)
    assert_same(gradients(module), before)
    assert torch.equal(torch.get_rng_state(), state)

    pipe.step = plain.step
    for run in (pipe, plain):
        run(x).square().sum().backward()
    assert_same(gradients(module), gradients(plain.module))


def test_a_failing_forward_is_not_a_step():
    module = nn.Sequential(nn.Linear(4, 4), Bomb())
    pipe = make_pipe(module)
    module[1].arm(ValueError("boom"), "forward")
    with pytest.raises(ValueError, match="boom"):
        pipe(torch.ones(6, 4))
    assert pipe.step == 0


def test_no_partial_gradients_and_hooks_come_back():
    module = nn.Sequential(nn.Linear(4, 4), Bomb(), nn.Linear(4, 4))
    pipe = make_pipe(module)
    fired = []
    module[2].weight.register_hook(lambda g: fired.append("before"))
    module[2].weight.register_post_accumulate_grad_hook(lambda p: fired.append("after"))
    module[0].weight.grad = torch.full((4, 4), 5.0)
    module[1].arm(ValueError("boom"), "backward", calls=3)
    with pytest.raises(ValueError, match="boom"):
        pipe(torch.ones(6, 4)).sum().backward()
    assert [name for name, g in gradients(module).items() if g is not None] == ["0.weight"]
    assert torch.equal(module[0].weight.grad, torch.full((4, 4), 5.0))
    assert fired == []
    pipe(torch.ones(6, 4)).sum().backward()
    assert fired == ["before", "after"]


@pytest.mark.parametrize(("place", "phase"), [(0, "forward"), (0, "backward"), (2, "forward"), (2, "backward")])
def test_others_who_wait_are_woken(place, phase):
    cells = [nn.Linear(4, 4) for _ in range(3)]
    cells[place] = Bomb()
    pipe = make_pipe(nn.Sequential(*cells), chunks=1, checkpoint="never")
    cells[place].arm(ValueError("boom"), phase)
    with pytest.raises(ValueError, match="boom"):
        pipe(torch.ones(6, 4)).sum().backward()
    assert {t.name for t in workers()} == {f"gpipe-worker-{w}" for w in range(3)}


def test_two_stages_fail_at_once():
    barrier = threading.Barrier(2)

    def fail(x):
        barrier.wait(timeout=10)
        raise ValueError("boom")

    pipe = make_pipe(nn.Sequential(Apply(lambda x: fail(x) if x[0, 0] == 2 else x), Apply(fail)), chunks=2)
    with pytest.raises(ValueError, match="boom"):
        pipe(torch.tensor([[1.0], [2.0]]))
    with pytest.raises(ValueError, match="boom"):
        pipe(torch.tensor([[1.0], [2.0]]))


def test_train_step_over_micro_batches_fails():
    module = linears()
    pipe = make_pipe(module)
    pipe.train_step(torch.ones(6, 4), None, lambda output, target: output.mean(), "micro_batch")
    before = gradients(module)
    calls = []

    def loss_fn(output, target):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("boom")
        return output.mean()

    with pytest.raises(ValueError, match="boom") as caught:
        pipe.train_step(torch.ones(6, 4), None, loss_fn, "micro_batch")
    assert caught.value.__notes__ == [
        "gpipe: raised in stage 2 (cells 2 to 2, cpu), cell loss_fn, micro-batch 1, action 2F1"
    ]
    assert_same(gradients(module), before)
    assert pipe.step == 1


def test_a_forward_that_depends_on_what_changed_is_noticed():
    calls = []

    def changing(x, linear):
        calls.append(1)
        return (linear(x), x) if len(calls) == 4 else (linear(x), linear(x))

    module = nn.Sequential(Apply(changing, nn.Linear(4, 4)))
    loss = make_pipe(module, checkpoint="always")(torch.ones(6, 4))[0].sum()
    with pytest.raises(RuntimeError, match=r"the recompute gave other outputs than forward did.*the same both times"):
        loss.backward()


# The traceback of what a worker raised held the worker's record of it, in a cycle with all activations.
@pytest.mark.parametrize("phase", ["forward", "recompute", "backward"])
def test_nothing_of_a_failed_mini_batch_stays(phase):
    alive = []

    class Payload:
        pass

    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.payload = Payload()  # as long as the graph lives
            alive.append(weakref.ref(ctx.payload))
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    module = nn.Sequential(nn.Linear(4, 4), Apply(Mark.apply), Bomb(), Apply(Mark.apply))
    pipe = make_pipe(module, [2, 2], checkpoint="never" if phase == "forward" else "except_last")
    module[2].arm(ValueError("boom"), phase, 1 if phase == "recompute" else 2)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="boom"):
            pipe(torch.ones(6, 4)).sum().backward()
        assert alive
        assert [ref() for ref in alive if ref() is not None] == []
    finally:
        gc.enable()


class Child:
    """A fork of this process that runs a function with a way to say something, for at most a minute."""

    def __init__(self, function):
        self._said, out = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            signal.alarm(60)  # a child that hangs ends, and says nothing more
            code = 1
            try:
                function(lambda *words: os.write(out, f"{' '.join(map(str, words))}\n".encode()))
                code = 0
            finally:
                os._exit(code)
        os.close(out)
        self._lines = os.fdopen(self._said)

    def hears(self, line):
        """Wait until it says this."""
        assert self._lines.readline() == line + "\n"

    def says(self):
        """Everything it says until it ends, which must be well."""
        said = self._lines.read().splitlines()
        self._lines.close()
        assert os.waitpid(self.pid, 0)[1] == 0, said
        return said


@needs_fork
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_ctrl_c_in_the_waiting_caller(phase):
    def program(say):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
        slow = True

        def nap():
            say("waiting")
            for _ in range(30):
                time.sleep(0.01)

        def wait(x, linear):
            y = linear(x)
            if slow and phase == "forward":
                nap()
            if slow and phase == "backward":
                y.register_hook(lambda g: nap())
            return y

        module = nn.Sequential(nn.Linear(4, 4), Apply(wait, nn.Linear(4, 4)), nn.Linear(4, 4))
        pipe = make_pipe(module, chunks=1)
        try:
            pipe(torch.ones(6, 4)).sum().backward()
        except KeyboardInterrupt:
            say("interrupted", [p.grad for p in module.parameters()] == [None] * 6)
        slow = False
        pipe(torch.ones(6, 4)).sum().backward()
        say(module[0].weight.grad is not None, len(workers()))

    child = Child(program)
    child.hears("waiting")
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    assert child.says() == ["interrupted True", "True 3"]


# The child waited for ever for workers that only the parent has.
@needs_fork
def test_a_fork_goes_on_with_workers_of_its_own():
    module = linears()
    pipe = make_pipe(module)
    pipe(torch.ones(6, 4)).sum().backward()
    begun = pipe(torch.ones(6, 4)).sum()

    def program(say):
        say(len(workers()))
        try:
            begun.backward()
        except RuntimeError as error:
            say(error)
        pipe(torch.ones(6, 4)).sum().backward()
        say(len(workers()))

    assert Child(program).says() == [
        "0",
        "this process was forked after the mini-batch went forward, and its workers stayed in the other: run forward "
        "and backward in the same process",
        "3",
    ]
    begun.backward()
    assert len(workers()) == 3


def python(program):
    """Run a program in an interpreter of its own."""
    prelude = "import torch\nfrom torch import nn\nfrom nets import Apply, linears, make_pipe\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def test_the_interpreter_exits_cleanly():
    done = python(
        """
pipes = [make_pipe(linears(), checkpoint=keep) for keep in ("always", "never")]
for pipe in pipes:
    pipe(torch.ones(6, 4)).sum().backward()
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_interpreter_exits_cleanly_after_an_error():
    done = python(
        """
def fail(x):
    raise ValueError("boom")
make_pipe(nn.Sequential(nn.Linear(4, 4), Apply(fail)))(torch.ones(6, 4))
"""
    )
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ValueError: boom\ngpipe: raised in stage 1 (cells 1 to 1, cpu), cell 1 (Apply), micro-batch 0, action 1F0\n"
    )


def test_collected_pipes_leave_no_threads():
    before = set(workers())
    for _ in range(5):
        pipe = make_pipe(linears())
        pipe(torch.ones(3, 4))
        pipe.cycle = pipe
    del pipe
    gc.collect()
    assert set(workers()) <= before


def test_a_pipe_collected_by_its_own_worker():
    before = set(workers())
    holder = []
    pipe = make_pipe(nn.Sequential(Apply(lambda x: (holder.clear(), x)[1])))
    holder.append(pipe)
    y = pipe(torch.ones(3, 4))
    del pipe
    assert y.shape == (3, 4)
    gc.collect()
    assert set(workers()) <= before
