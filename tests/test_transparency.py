"""Whatever a user does with a module and its output, a pipe of it does the same, or says clearly why not."""

import contextvars
import threading
import time
from collections import namedtuple
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import Apply, PlainLoop, assert_as_plain, assert_same, compositions, gradients, linears, make_pipe
from torch import nn

from gpipe import GPipe, is_checkpointing, is_recomputing

KEEPS = ("always", "except_last", "never")
every_keep = pytest.mark.parametrize("keep", KEEPS)


def nets(keep, make=linears, balance=None, **options):
    """A module, its pipe and its plain loop, which is on a copy."""
    torch.manual_seed(1)
    plain = make()
    torch.manual_seed(1)
    module = make()
    return module, make_pipe(module, balance, checkpoint=keep, **options), PlainLoop(plain, options.get("chunks", 3))


def assert_same_gradients(module, plain, where=""):
    assert_same(gradients(module), gradients(plain.module), where)


# Backward


@every_keep
def test_backward_twice_is_refused(keep):
    module, pipe, plain = nets(keep)
    loss, expected = pipe(torch.ones(6, 4)).sum(), plain(torch.ones(6, 4)).sum()
    loss.backward()
    expected.backward()
    with pytest.raises(RuntimeError, match=r"gone backward already.*pass retain_graph=True"):
        loss.backward()
    assert_same_gradients(module, plain)


@every_keep
def test_retain_graph(keep):
    module, pipe, plain = nets(keep, lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()))
    x = torch.randn(6, 4)
    outputs = pipe(x), plain(x)
    for output in outputs:
        output.square().sum().backward(retain_graph=True)
        output.exp().sum().backward(retain_graph=True)
        output.sum().backward()
    assert_same_gradients(module, plain)
    with pytest.raises(RuntimeError, match="gone backward already"):
        outputs[0].sum().backward()


@every_keep
def test_second_forward_before_the_first_backward(keep):
    module, pipe, plain = nets(keep, lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
    x = torch.randn(2, 6, 4)
    for run in (pipe, plain):
        first, second = run(x[0]), run(x[1])
        second.square().sum().backward()
        (first**3).sum().backward()
    assert_same_gradients(module, plain)
    for run in (pipe, plain):
        run.module.zero_grad() if run is plain else run.zero_grad()
        (run(x[0]).square().sum() + run(x[1]).exp().sum()).backward()
    torch.testing.assert_close(gradients(module), gradients(plain.module))


@every_keep
def test_gradients_are_added_to_what_is_there(keep):
    module, pipe, plain = nets(keep)
    for run in (pipe, plain):
        for x in torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)):
            run(x).square().sum().backward()
    assert_same_gradients(module, plain)
    kept = module[0].weight.grad
    pipe(torch.ones(6, 4)).sum().backward()
    assert module[0].weight.grad is kept


@every_keep
@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_is_refused(keep):
    module, pipe, _ = nets(keep)
    loss = pipe(torch.ones(6, 4)).square().sum()
    with pytest.raises(RuntimeError, match="create_graph=True asks for a gradient of the gradient"):
        torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate the unwrapped module"):
        loss.backward(create_graph=True)
    assert all(p.grad is None for p in module.parameters())
    loss.backward()
    assert module[0].weight.grad is not None


@every_keep
def test_autograd_grad_of_inputs_and_parameters(keep):
    module, pipe, plain = nets(keep)
    found, expected = [], []
    for run, its, into in ((pipe, module, found), (plain, plain.module, expected)):
        x = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
        into += torch.autograd.grad(run(x).square().sum(), [x, *its.parameters()])
        into += torch.autograd.grad(run(x).exp().sum(), its[1].weight)
        into += torch.autograd.grad(run(x).exp().sum(), x)
        assert x.grad is None
        assert all(p.grad is None for p in its.parameters())
    assert_same(found, expected)


@every_keep
def test_backward_into_chosen_tensors(keep):
    module, pipe, _ = nets(keep)
    pipe(torch.ones(6, 4)).sum().backward(inputs=[module[1].weight])
    assert [name for name, g in gradients(module).items() if g is not None] == ["1.weight"]


@every_keep
def test_inputs_that_require_grad(keep):
    _, pipe, plain = nets(keep)
    inputs = []
    for run in (pipe, plain):
        base = torch.linspace(-1, 1, 24).view(6, 4).requires_grad_()
        run(base.sin()).square().sum().backward()
        inputs.append(base.grad)
    assert_same(inputs[:1], inputs[1:])


def test_input_gradients_of_a_frozen_model():
    module, pipe, _ = nets("always")
    pipe.requires_grad_(False)
    x = torch.randn(6, 4, requires_grad=True)
    pipe(x).sum().backward()
    expected = torch.ones(6, 4) @ module[2].weight @ module[1].weight @ module[0].weight
    torch.testing.assert_close(x.grad, expected)


@every_keep
def test_part_of_the_output_is_used(keep):
    def make():
        return nn.Sequential(nn.Linear(4, 4), Apply(lambda x, a, b: (a(x), b(x)), nn.Linear(4, 4), nn.Linear(4, 4)))

    module, pipe, plain = nets(keep, make)
    for run in (pipe, plain):
        run(torch.ones(6, 4))[0][:4].sum().backward()
    assert module[1].parts[1].weight.grad is None
    assert_same_gradients(module, plain)


@every_keep
def test_the_output_may_be_written_to(keep):
    module, pipe, plain = nets(keep, chunks=1)
    for run in (pipe, plain):
        y = run(torch.ones(6, 4))
        y.mul_(2).add_(1)
        y.square().sum().backward()
    assert_same_gradients(module, plain)


def in_threads(*functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# A backward ran beside another thread's, each taking the other's gradients for its own.
def test_backward_from_several_threads():
    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.01)
            return gradient

    module = nn.Sequential(nn.Linear(4, 4), Apply(SlowBackward.apply), nn.Linear(4, 4))
    pipe = make_pipe(module)
    inputs = torch.randn(4, 6, 4)
    parameters = list(module.parameters())
    expected = [torch.autograd.grad(pipe(x).square().sum(), parameters) for x in inputs]
    losses = [pipe(x).square().sum() for x in inputs]
    found = [None] * 4

    def differentiate(i):
        found[i] = torch.autograd.grad(losses[i], parameters)

    in_threads(*(partial(differentiate, i) for i in range(4)))
    for i in range(4):
        assert_same(found[i], expected[i])


def test_forward_and_backward_from_several_threads():
    module = linears()
    pipe = make_pipe(module, checkpoint="always")
    parameters = list(module.parameters())
    inputs = torch.randn(3, 6, 4)
    expected = [torch.autograd.grad(pipe(x).square().sum(), parameters) for x in inputs]
    found = [[] for _ in inputs]

    def train(i):
        for _ in range(8):
            found[i].append(torch.autograd.grad(pipe(inputs[i]).square().sum(), parameters))

    in_threads(*(partial(train, i) for i in range(3)))
    for i in range(3):
        for gradient in found[i]:
            assert_same(gradient, expected[i])
    assert all(p.grad is None for p in parameters)


# Modes


@every_keep
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(keep, mode):
    _, pipe, plain = nets(keep)
    x = torch.randn(6, 4, requires_grad=True)
    with mode():
        found, expected = pipe(x), plain(x)
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert found.is_inference() == (mode is torch.inference_mode)
    found, expected = pipe(x), plain(x)
    assert found.requires_grad
    assert torch.equal(found, expected)


@every_keep
def test_nothing_requires_grad(keep):
    _, pipe, plain = nets(keep)
    pipe.requires_grad_(False)
    found = pipe(torch.ones(6, 4))
    assert not found.requires_grad
    assert torch.equal(found, plain(torch.ones(6, 4)))


@every_keep
def test_eval_mode(keep):
    module, pipe, plain = nets(keep, lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)))
    pipe.eval()
    plain.module.eval()
    for run in (pipe, plain):
        run(torch.ones(6, 4)).sum().backward()
    assert_same_gradients(module, plain)
    assert not module[1].num_batches_tracked


# A recompute ran in the mode of the moment: without dropout, and with running instead of batch statistics.
@every_keep
@pytest.mark.parametrize("first", [True, False])
def test_the_mode_may_change_before_backward(keep, first):
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh())

    module, pipe, plain = nets(keep, make, [3, 2])
    for run, its in ((pipe, pipe), (plain, plain.module)):
        its.train(first)
        loss = run(torch.randn(6, 4, generator=torch.Generator().manual_seed(0))).square().sum()
        its.train(not first)
        loss.backward()
        assert {m.training for m in its.modules()} == {not first}
    assert_same_gradients(module, plain)
    assert_same(module.state_dict(), plain.module.state_dict())


@every_keep
def test_frozen_stage_and_stage_without_parameters(keep):
    def make():
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
        module[0].requires_grad_(False)
        module[3].requires_grad_(False)
        return module

    assert_as_plain(make, torch.randn(6, 4), keeps=(keep,), balances=compositions(5)[::3])


def test_unused_parameters_get_no_gradient():
    module = nn.Sequential(Apply(lambda x, used, unused: used(x), nn.Linear(4, 4), nn.Linear(4, 4)), nn.Tanh())
    make_pipe(module)(torch.ones(6, 4)).sum().backward()
    assert module[0].parts[0].weight.grad is not None
    assert module[0].parts[1].weight.grad is None


class Modes(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(
            {
                "grad": torch.is_grad_enabled(),
                "inference": torch.is_inference_mode_enabled(),
                "autocast": torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "variable": variable.get(),
                "device": torch.get_default_device(),
            }
        )
        return x


variable = contextvars.ContextVar("variable", default="default")


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        (lambda: torch.no_grad(), {"grad": False}),
        (lambda: torch.inference_mode(), {"grad": False, "inference": True}),
        (lambda: torch.autocast("cpu", torch.bfloat16), {"autocast": torch.bfloat16}),
        (lambda: torch.autocast("cpu", torch.float16), {"autocast": torch.float16}),
        (lambda: torch.device("meta"), {"device": torch.device("meta")}),
        (lambda: torch.enable_grad(), {}),
    ],
)
def test_the_callers_context_reaches_the_cells(context, expected):
    plain = {
        "grad": True,
        "inference": False,
        "autocast": False,
        "deterministic": False,
        "variable": "default",
        "device": torch.device("cpu"),
    }
    seen = []
    pipe = make_pipe(nn.Sequential(Modes(seen), Modes(seen)))
    x = torch.ones(6, 4)
    pipe(x)
    with context():
        pipe(x)
    pipe(x)
    assert seen == [plain] * 6 + [plain | expected] * 6 + [plain] * 6


def test_context_variables_and_deterministic_mode_reach_the_cells():
    seen = []
    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), Modes(seen)), checkpoint="always")
    torch.use_deterministic_algorithms(True)
    token = variable.set("set")
    try:
        loss = pipe(torch.ones(6, 4)).sum()
    finally:
        variable.reset(token)
        torch.use_deterministic_algorithms(False)
    assert [(s["variable"], s["deterministic"]) for s in seen] == [("set", True)] * 3
    loss.backward()
    assert [s["variable"] for s in seen[3:]] == ["set"] * 3


def test_what_a_cell_may_ask_about_its_situation():
    seen = []

    def ask(x, linear):
        seen.append((is_checkpointing(), is_recomputing()))
        return linear(x)

    pipe = make_pipe(nn.Sequential(Apply(ask, nn.Linear(4, 4))), checkpoint="except_last")
    pipe(torch.ones(6, 4)).sum().backward()
    assert seen == [(True, False)] * 2 + [(False, False)] + [(False, True)] * 2
    seen.clear()
    with torch.no_grad():
        pipe(torch.ones(6, 4))
    assert seen == [(False, False)] * 3
    assert (is_checkpointing(), is_recomputing()) == (False, False)


# Autocast


class Island(nn.Module):
    """A cell that leaves the caller's autocast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float())


def test_autocast_gives_the_same_bits_for_every_balance_and_keep():
    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), Island(), nn.Dropout(0.5))

    found = {}
    for balance in compositions(5)[::3]:
        for keep in KEEPS:
            module, pipe, _ = nets(keep, make, balance)
            with torch.autocast("cpu", torch.bfloat16):
                output = pipe(torch.linspace(-1, 1, 24).view(6, 4))
                loss = output.square().mean()
            loss.backward()
            found[str(balance), keep] = gradients(module) | {"output": output}
    first = next(iter(found.values()))
    for where, values in found.items():
        assert_same(values, first, where)

    module, _, plain = nets("never", make)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        loss = plain(torch.linspace(-1, 1, 24).view(6, 4)).square().mean()
    loss.backward()
    assert_same(gradients(plain.module), {k: v for k, v in first.items() if k != "output"})
    assert first["0.weight"].dtype == torch.float32


# train_step ran backward in the caller's autocast over the mini-batch, but not over micro-batches.
@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step_goes_backward_outside_of_autocast(loss_over):
    module, pipe, plain = nets("always", lambda: nn.Sequential(nn.Linear(4, 4), Island(), nn.Linear(4, 4)), chunks=1)
    x, y = torch.randn(2, 6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        pipe.train_step(x, y, F.mse_loss, loss_over)
        loss = F.mse_loss(plain(x), y)
    loss.backward()
    assert_same_gradients(module, plain)


# What passes a boundary

Pair = namedtuple("Pair", "left right")


def test_boundaries_of_every_kind():
    def start(x, linear):
        h = linear(x)
        return {
            "h": h,
            "index": torch.arange(len(x)),
            "mask": h > 0,
            "nothing": None,
            "number": 3,
            "text": "text",
            "pair": Pair([h * 2, (True, 1.5)], ()),
            "complex": torch.complex(h, h),
            "scalar": torch.tensor(2.0),
            "half": h.bfloat16(),
        }

    def middle(t):
        assert t["nothing"] is None
        assert t["number"] == 3
        assert t["text"] == "text"
        assert isinstance(t["pair"], Pair)
        assert t["pair"].left[1] == (True, 1.5)
        assert t["pair"].right == ()
        assert t["mask"].dtype == torch.bool
        assert not t["index"].requires_grad
        assert t["scalar"].dim() == 0
        h = t["h"] * t["mask"] * t["scalar"] + t["pair"].left[0] + t["complex"].imag + t["half"].float()
        return t | {"h": h + t["index"][:, None]}

    def end(t, linear):
        return linear(t["h"]), t["nothing"], t["number"], t["index"]

    def make():
        return nn.Sequential(Apply(start, nn.Linear(4, 4)), Apply(middle), Apply(end, nn.Linear(4, 4)))

    assert_as_plain(make, torch.randn(7, 4), lambda y: y[0].square().sum())
    output = make_pipe(make())(torch.randn(7, 4))
    assert output[1:3] == (None, 3)
    assert output[3].tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_inputs_of_every_kind():
    def start(t, linear):
        assert t["flag"] is True
        assert t["none"] is None
        return linear(t["x"]) * t["scale"] + t["more"][0][:, None]

    def make():
        return nn.Sequential(Apply(start, nn.Linear(4, 4)), nn.Tanh())

    inputs = {
        "x": torch.randn(7, 4),
        "more": (torch.arange(7), []),
        "flag": True,
        "none": None,
        "scale": torch.tensor(2.0),
    }
    assert_as_plain(make, inputs)


def test_a_scalar_input_gets_the_gradient_of_all_micro_batches():
    scale = torch.tensor(2.0, requires_grad=True)
    make_pipe(nn.Sequential(Apply(lambda t: t[0] * t[1])))((torch.ones(6, 4), scale)).sum().backward()
    assert scale.grad == 24


class Hiding(dict):
    pass


class Slots:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize("hide", [lambda x: Hiding(x=x), Slots, lambda x: {x}, lambda x: Hiding(x=[x])])
def test_tensors_hidden_from_the_pytree_are_refused(hide):
    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), Apply(lambda x: (x, hide(x))), Apply(lambda t: t[0])))
    with pytest.raises(TypeError, match=r"a stage's output is a .* that holds tensors which the pipeline cannot see"):
        pipe(torch.ones(6, 4))
    with pytest.raises(TypeError, match=r"input\[1\] is a .* that holds tensors"):
        pipe((torch.ones(6, 4), hide(torch.ones(6, 4))))


# In place


@pytest.mark.parametrize("place", [0, 1, 2])
def test_in_place_at_the_start_of_a_stage(place):
    def make(function):
        torch.manual_seed(1)
        cells = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
        cells[place] = Apply(lambda x, linear: linear(function(x)), cells[place])
        return nn.Sequential(*cells)

    module, plain = make(lambda x: x.mul_(2).add_(1)), make(lambda x: x * 2 + 1)
    for balance in compositions(3):
        for keep in KEEPS:
            x = torch.linspace(-1, 1, 24).view(6, 4)
            module.zero_grad()
            plain.zero_grad()
            make_pipe(module, balance, checkpoint=keep)(x).square().sum().backward()
            assert torch.equal(x, torch.linspace(-1, 1, 24).view(6, 4))
            PlainLoop(plain)(x).square().sum().backward()
            assert_same(gradients(module), gradients(plain), f"{balance} {keep}")


# Micro-batches shared a 0-dim tensor, so that each saw what the one before had written to it.
@every_keep
def test_a_scalar_input_may_be_written_to(keep):
    module = nn.Sequential(Apply(lambda t: t[0] * t[1].add_(1)), nn.Linear(4, 4))
    scale = torch.tensor(1.0)
    output = make_pipe(module, checkpoint=keep)((torch.ones(6, 4), scale))
    assert torch.equal(output, PlainLoop(nn.Sequential(module[1]))(torch.full((6, 4), 2.0)))
    output.sum().backward()
    assert scale == 1


# A recompute read the caller's tensor, with what had been written to it since.
@every_keep
def test_inputs_may_be_written_to_before_backward(keep):
    module, pipe, plain = nets(keep)
    x = torch.randn(6, 4)
    for run in (pipe, plain):
        buffer = x.clone()
        loss = run(buffer).square().sum()
        if run is pipe:
            buffer.zero_()
        loss.backward()
    assert_same_gradients(module, plain)


# Autograd no longer knows that the one is a view of the other.
@every_keep
def test_writing_to_a_tensor_that_overlaps_with_another_is_refused(keep):
    def make():
        start = Apply(lambda x, linear: (h := linear(x), h[:, 1:]), nn.Linear(4, 4))
        return nn.Sequential(start, Apply(lambda t: t[0].relu_() + t[1].sum()))

    with pytest.raises(RuntimeError, match="modified in place a tensor that it receives together with a view of it"):
        make_pipe(make(), checkpoint=keep)(torch.ones(6, 4))
    assert_as_plain(make, torch.randn(6, 4), balances=[[2]], keeps=(keep,))


def test_writing_to_one_half_of_a_tensor():
    def halves(x, linear):
        h = linear(x)
        return h[:, :2], h[:, 2:]

    def make():
        join = Apply(lambda t: torch.cat([t[0].mul_(2), t[1]], 1))
        return nn.Sequential(Apply(halves, nn.Linear(4, 4)), join, nn.Linear(4, 4))

    assert_as_plain(make, torch.randn(6, 4))


def test_parameters_modified_before_backward_are_noticed():
    for frozen in (False, True):
        module, pipe, _ = nets("always")
        module[1].requires_grad_(not frozen)
        loss = pipe(torch.ones(6, 4)).sum()
        with torch.no_grad():
            module[1].weight.mul_(2)
        with pytest.raises(RuntimeError, match="a parameter was modified in place after forward began"):
            loss.backward()
    module, pipe, _ = nets("never")
    loss = pipe(torch.ones(6, 4)).sum()
    with torch.no_grad():
        module[0].weight.mul_(2)  # whose value no gradient depends on
    loss.backward()


def test_buffers_modified_before_backward_are_noticed():
    module = nn.Sequential(nn.Linear(4, 4), Apply(lambda x, part: x * part.mask, nn.Module()))
    module[1].parts[0].register_buffer("mask", torch.ones(4))
    loss = make_pipe(module, checkpoint="always")(torch.ones(6, 4)).sum()
    module[1].parts[0].mask.zero_()
    with pytest.raises(RuntimeError, match="the buffer 'mask' of Module was modified in place after forward began"):
        loss.backward()


# A gradient inside a cell's forward met activations that were dropped already.
def test_a_cell_may_differentiate_in_its_forward():
    def force(x, energy):
        x = x if x.requires_grad else x.detach().requires_grad_()
        (found,) = torch.autograd.grad(energy(x).tanh().square().sum(), x, create_graph=True)
        return found

    assert_as_plain(lambda: nn.Sequential(nn.Linear(4, 4), Apply(force, nn.Linear(4, 4)), nn.Tanh()), torch.randn(6, 4))


# Hooks, clipping, scaling, schedules, optimisers


@every_keep
def test_hooks_fire_once_with_the_whole_gradient(keep):
    module, pipe, plain = nets(keep)
    calls = []
    for run, its in ((pipe, module), (plain, plain.module)):
        before, after = [], []
        its[0].weight.register_hook(lambda g, before=before: before.append(g.clone()) or g * 2)
        its[1].weight.register_post_accumulate_grad_hook(lambda p, after=after: after.append(p.grad.clone()))
        for _ in range(2):
            run(torch.ones(6, 4)).square().sum().backward()
        assert (len(before), len(after)) == (2, 2)
        calls.append(before + after)
    assert_same(*calls)
    assert_same_gradients(module, plain)


def test_an_optimizer_step_in_a_hook():
    module, pipe, plain = nets("always")
    for run, its in ((pipe, module), (plain, plain.module)):
        optimizers = {p: torch.optim.Adam([p], 0.1) for p in its.parameters()}

        def step(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in its.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            run(torch.ones(6, 4)).square().sum().backward()
    assert_same(module.state_dict(), plain.module.state_dict())


def test_output_hooks():
    _, pipe, _ = nets("except_last")
    y = pipe(torch.ones(6, 4))
    seen = []
    y.register_hook(lambda g: seen.append(g))
    y.retain_grad()
    y.sum().backward()
    assert len(seen) == 1
    assert torch.equal(y.grad, torch.ones(6, 4))


@every_keep
def test_clipping_the_gradient_norm(keep):
    module, pipe, plain = nets(keep)
    norms = []
    for run, its in ((pipe, pipe), (plain, plain.module)):
        run(torch.ones(6, 4)).square().sum().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(its.parameters(), 0.1))
    assert torch.equal(*norms)
    assert_same_gradients(module, plain)


def test_grad_scaler():
    module, pipe, plain = nets("always")
    for run, its in ((pipe, pipe), (plain, plain.module)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = torch.optim.SGD(its.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            scale = float("inf") if step == 1 else 1.0
            scaler.scale(run(torch.ones(6, 4)).square().sum() * scale).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512.0
    assert_same(module.state_dict(), plain.module.state_dict())


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        lambda p: torch.optim.Adagrad(p, 0.1),
        lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
        lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3),
        lambda p: torch.optim.Adafactor(p, 0.1),
    ],
)
def test_optimizers_and_schedules(optimizer):
    module, pipe, plain = nets("except_last")
    for run, its in ((pipe, pipe), (plain, plain.module)):
        chosen = optimizer(its.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, 3)

        def closure(run=run, chosen=chosen):
            chosen.zero_grad()
            loss = run(torch.ones(6, 4)).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            chosen.step(closure)
            schedule.step()
    assert_same(module.state_dict(), plain.module.state_dict())


def test_sparse_gradients():
    def make():
        return nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))

    module, pipe, plain = nets("always", make)
    tokens = torch.tensor([[1, 2], [3, 1], [8, 0], [2, 2]])
    for run, its in ((pipe, module), (plain, plain.module)):
        run(tokens).square().sum().backward()
        torch.optim.SparseAdam([its[0].weight], 0.1).step()
    assert module[0].weight.grad.is_sparse
    assert_same(module.state_dict(), plain.module.state_dict())


def test_a_parameter_used_outside_the_pipe_too():
    module, pipe, plain = nets("always")
    for run, its in ((pipe, module), (plain, plain.module)):
        (run(torch.ones(6, 4)) @ its[0].weight).square().sum().backward()
    torch.testing.assert_close(gradients(module), gradients(plain.module))


# train_step


@pytest.mark.parametrize("rows", [12, 11])
@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step(rows, loss_over):
    x, y = torch.randn(rows, 4, dtype=torch.float64), torch.randint(0, 3, (rows,))

    def make():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    for balance in compositions(3):
        for keep in KEEPS:
            module, pipe, plain = nets(keep, make, balance, chunks=5)
            loss = pipe.train_step(x, y, F.cross_entropy, loss_over)
            expected = F.cross_entropy(plain.module(x), y)
            expected.backward()
            assert not loss.requires_grad
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(gradients(module), gradients(plain.module), rtol=1e-11, atol=1e-14)
            assert pipe.step == 1


class LearnedLoss(nn.Module):
    """With a parameter, a draw, and a buffer that counts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, target):
        self.calls += 1
        return ((F.dropout(output, 0.5) * self.scale - target) ** 2).mean()


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step_of_a_loss_with_parameters(loss_over):
    x, y = torch.randn(2, 12, 4)
    results = []
    for balance in compositions(3):
        for keep in KEEPS:
            torch.manual_seed(1)
            module, loss_fn = linears(), LearnedLoss()
            pipe = make_pipe(module, balance, 4, keep)
            loss = pipe.train_step(x, y, loss_fn, loss_over)
            assert loss_fn.calls == (4 if loss_over == "micro_batch" else 1), keep
            assert loss_fn.scale.grad != 0
            results.append({"loss": loss, "scale": loss_fn.scale.grad} | gradients(module))
            assert_same(results[-1], results[0], f"{balance} {keep}")


def test_train_step_keeps_hooks_and_earlier_gradients():
    module, pipe, _ = nets("always")
    x, y = torch.randn(2, 6, 4)
    seen = []
    module[0].weight.register_hook(lambda g: seen.append(g.clone()))
    for _ in range(2):
        pipe.train_step(x, y, F.mse_loss, "micro_batch")
    assert len(seen) == 2
    assert torch.equal(module[0].weight.grad, seen[0] + seen[1])


def test_train_step_passes_gradients_to_the_input():
    _, pipe, plain = nets("always", chunks=1)
    x, y = torch.randn(2, 6, 4)
    grads = []
    for run in (
        lambda x: pipe.train_step(x, y, F.mse_loss, "micro_batch"),
        lambda x: F.mse_loss(plain(x), y).backward(),
    ):
        x.grad = None
        x.requires_grad_()
        run(x)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("targets", [None, 2.0, torch.tensor(2.0), {"value": 2.0}])
def test_train_step_targets_without_rows(targets):
    def loss_fn(output, target):
        target = target["value"] if isinstance(target, dict) else target
        return (output * (2.0 if target is None else target)).mean()

    losses = []
    for loss_over in ("mini_batch", "micro_batch"):
        _, pipe, _ = nets("always")
        losses.append(pipe.train_step(torch.ones(6, 4), targets, loss_fn, loss_over))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"targets": torch.ones(5, 4)}, ValueError, "inputs have 6 rows, targets have 5"),
        ({"loss_fn": None}, TypeError, "loss_fn must be callable"),
        ({"loss_fn": lambda output, target: output}, ValueError, r"one floating-point number, got shape \("),
        ({"loss_fn": lambda output, target: 1.0}, TypeError, "loss_fn must return a tensor, got float"),
        ({"loss_fn": lambda output, target: output.argmax()}, ValueError, "torch.int64"),
        ({"inputs": 3}, TypeError, "at least one tensor with a batch dimension"),
    ],
)
def test_train_step_refuses(loss_over, arguments, error, match):
    module, pipe, _ = nets("always")
    given = {"inputs": torch.ones(6, 4), "targets": torch.ones(6, 4), "loss_fn": F.mse_loss} | arguments
    with pytest.raises(error, match=match):
        pipe.train_step(**given, loss_over=loss_over)
    assert all(p.grad is None for p in module.parameters())
    pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), F.mse_loss, loss_over)


def test_train_step_needs_gradients_and_a_known_word():
    _, pipe, _ = nets("always")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(RuntimeError, match="train_step computes gradients: call it outside"):
            pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), F.mse_loss)
    with pytest.raises(ValueError, match="loss_over must be 'mini_batch' or 'micro_batch', got 'batch'"):
        pipe.train_step(torch.ones(6, 4), torch.ones(6, 4), F.mse_loss, "batch")


@pytest.mark.parametrize("loss_over", ["mini_batch", "micro_batch"])
def test_train_step_without_rows(loss_over):
    _, pipe, _ = nets("always")
    assert pipe.train_step(torch.ones(0, 4), torch.ones(0, 4), F.mse_loss, loss_over).isnan()


# Other uses


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of torch.compile's own
def test_compiled_cells():
    def compiled():
        return torch.compile(
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()), backend="aot_eager", fullgraph=True
        )

    results = []
    for balance in compositions(3):
        for keep in ("always", "never"):
            module, pipe, _ = nets(keep, lambda: nn.Sequential(nn.Linear(4, 4), compiled(), nn.Linear(4, 4)), balance)
            pipe(torch.linspace(-1, 1, 24).view(6, 4)).square().sum().backward()
            results.append(gradients(module))
            assert_same(results[-1], results[0], f"{balance} {keep}")


def test_operators_of_higher_order():
    def either(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    module = nn.Sequential(nn.Linear(4, 4), Apply(either))
    with torch.no_grad():
        assert torch.equal(make_pipe(module)(torch.ones(6, 4)), PlainLoop(module)(torch.ones(6, 4)))


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_detection():
    module, pipe, plain = nets("except_last")
    with torch.autograd.set_detect_anomaly(True):
        for run in (pipe, plain):
            run(torch.ones(6, 4)).square().sum().backward()
    assert_same_gradients(module, plain)


def test_a_pipe_inside_a_module():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inwards = nn.Linear(4, 4)
            self.pipe = GPipe(linears(), [2, 1], devices=["cpu"] * 2, chunks=3)
            self.outwards = nn.Linear(4, 4)

        def forward(self, x):
            return self.outwards(self.pipe(self.inwards(x)))

    whole = Whole()
    plain = nn.Sequential(whole.inwards, whole.pipe.module, whole.outwards)
    x = torch.randn(6, 4)
    whole(x).sum().backward()
    found = gradients(whole)
    whole.zero_grad()
    plain(x).sum().backward()
    torch.testing.assert_close(found, gradients(whole))
    assert list(whole.state_dict())[2] == "pipe.0.weight"
    other = Whole()
    other.load_state_dict(whole.state_dict())
    assert_same(other.state_dict(), whole.state_dict())
