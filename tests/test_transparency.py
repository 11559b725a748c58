"""Whatever a user does with a module and its output, a pipe of it does the same, or says clearly why not."""

import contextvars
import threading
import time
import warnings
from functools import partial

import pytest
import torch
from nets import (
    KEEPS,
    Apply,
    FrozenNorms,
    Island,
    PlainLoop,
    assert_as_plain,
    assert_same,
    assert_same_gradients,
    compositions,
    every_keep,
    gradients,
    linears,
    make_pipe,
    nets,
    workers,
)
from torch import nn
from torch.autograd import forward_ad

from gpipe import GPipe, is_checkpointing, is_recomputing


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


@every_keep
def test_inputs_that_no_output_depends_on_get_no_gradient(keep):
    module = nn.Sequential(Apply(lambda t: (t[0] * 2, t[1])), Apply(lambda t: t[0]))
    used, unused = torch.ones(2, 6, 4).requires_grad_().unbind()
    used.retain_grad()
    unused.retain_grad()
    make_pipe(module, checkpoint=keep)((used, unused)).sum().backward()
    assert torch.equal(used.grad, torch.full((6, 4), 2.0))
    assert unused.grad is None


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


class Look(torch.autograd.Function):
    """Calls a function in forward and in backward."""

    @staticmethod
    def forward(ctx, x, look):
        ctx.look = look
        look()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.look()
        return gradient, None


@pytest.mark.parametrize("balance", [[2], [1, 1]])
def test_one_stage_runs_in_the_callers_thread_and_several_do_not(balance):
    seen, before = [], workers()
    cell = Apply(lambda x: Look.apply(x, lambda: seen.append(threading.current_thread() is threading.main_thread())))
    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), cell), balance, checkpoint="never")
    pipe(torch.ones(6, 4)).sum().backward()
    pipe.train_step(torch.ones(6, 4), None, lambda y, _: y.sum(), "micro_batch")
    assert seen == [len(balance) == 1] * 12
    assert len(workers()) - len(before) == (0 if len(balance) == 1 else 2)


@pytest.mark.parametrize("balance", [[2], [1, 1]])
def test_stages_keep_their_threads_and_train_step_goes_backward_without_autocast(balance):
    seen = []
    cell = Apply(
        lambda x: Look.apply(x, lambda: seen.append((torch.get_num_threads(), torch.is_autocast_enabled("cpu"))))
    )
    pipe = make_pipe(nn.Sequential(nn.Linear(4, 4), cell), balance, checkpoint="never")
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            pipe.train_step(torch.ones(6, 4), None, lambda y, _: y.sum(), "micro_batch")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert sorted(seen) == [(1, False)] * 3 + [(1, True)] * 3


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


# Between forward and backward, and beside them


def test_parameters_modified_before_backward_are_noticed():
    for frozen in (False, True):
        module, pipe, _ = nets("always")
        module[1].requires_grad_(not frozen)
        loss = pipe(torch.ones(6, 4)).sum()
        with torch.no_grad():
            module[1].weight.mul_(2)
        with pytest.raises(RuntimeError, match="a parameter was modified in place after forward began"):
            loss.backward()
    module, pipe, _ = nets("always")
    loss = pipe(torch.ones(6, 4)).sum()
    module[1].weight.data = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="a parameter was modified in place after forward began"):
        loss.backward()
    module, pipe, _ = nets("never")
    loss = pipe(torch.ones(6, 4)).sum()
    with torch.no_grad():
        module[0].weight.mul_(2)  # whose value no gradient depends on
    loss.backward()


# A recompute ran with the module's parameters of the moment.
@every_keep
def test_parameters_may_be_replaced_before_backward(keep):
    module, pipe, plain = nets(keep)
    x = torch.randn(6, 4)
    for run, its in ((pipe, module), (plain, plain.module)):
        used = its[1].weight
        loss = run(x).square().sum()
        its[1].weight = nn.Parameter(torch.zeros(4, 4))
        loss.backward()
        assert its[1].weight.grad is None
        assert not its[1].weight.any()
        its[1].weight = used
    assert_same_gradients(module, plain)


@every_keep
def test_functional_call(keep):
    module, pipe, _ = nets(keep)
    given = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    x = torch.randn(6, 4)
    results = []
    for run in (pipe, module):
        loss = torch.func.functional_call(run, given, (x,)).square().mean()
        results.append(torch.autograd.grad(loss, list(given.values())))
    torch.testing.assert_close(*results)
    assert all(p.grad is None for p in (*module.parameters(), *given.values()))

    computed = {name: p * 2 for name, p in given.items()}
    with pytest.raises(RuntimeError, match="computed from other tensors"):
        torch.func.functional_call(pipe, computed, (x,))
    with torch.no_grad():
        torch.func.functional_call(pipe, computed, (x,))


# Forward-mode gave no tangent at all, the others an error about storage.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # used by make_dual
def test_transforms_of_functions_are_refused():
    _, pipe, _ = nets("always")
    x = torch.randn(6, 4)
    for transformed in (
        lambda: torch.func.grad(lambda x: pipe(x).sum())(x),
        lambda: torch.vmap(pipe)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=r"torch.func transforms and forward-mode .* the unwrapped module"):
            transformed()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="do not reach the workers"):
        pipe(forward_ad.make_dual(x, x))
    jacobian = torch.autograd.functional.jacobian(lambda x: pipe(x).sum(0), x)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(lambda x: pipe.module(x).sum(0), x))


def test_buffers_modified_before_backward_are_noticed():
    module = nn.Sequential(nn.Linear(4, 4), Apply(lambda x, part: x * part.mask, nn.Module()))
    module[1].parts[0].register_buffer("mask", torch.ones(4))
    loss = make_pipe(module, checkpoint="always")(torch.ones(6, 4)).sum()
    module[1].parts[0].mask.zero_()
    with pytest.raises(RuntimeError, match="the buffer 'mask' of Module was modified in place after forward began"):
        loss.backward()


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


def test_a_module_has_a_training_mode_of_its_own():
    module = FrozenNorms(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    pipe = make_pipe(module)
    pipe.eval()
    pipe.train()
    assert pipe.training
    assert [m.training for m in module] == [True, False, True]


class FrozenInside(nn.Module):
    """Batch norm stays in eval mode, in a cell made anew."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def cells(self):
        return [nn.Sequential(self.first, self.norm), self.last]

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


def test_a_training_mode_of_its_own_reaches_cells_made_anew():
    module = FrozenInside()
    pipe = make_pipe(module)
    pipe.eval()
    pipe.train()
    assert [module.first.training, module.norm.training, module.last.training] == [True, False, True]


class ScriptedInside(nn.Module):
    """Its cells are children of a scripted module."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.jit.script(linears())

    def cells(self):
        return list(self.blocks.children())


# A recompute trained what was frozen while the forward ran: a generator's step past its discriminator.
@every_keep
def test_parameters_thawed_between_forward_and_backward(keep):
    module, pipe, plain = nets(keep)
    x = torch.randn(6, 4)
    for run, own in ((pipe, module), (plain, plain.module)):
        own[1].requires_grad_(False)
        loss = run(x).square().sum()
        own[1].requires_grad_(True)
        loss.backward()
    assert module[1].weight.grad is None
    assert module[1].weight.requires_grad
    assert_same_gradients(module, plain)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_whole_module_run_in_train_step_or_are_refused(register):
    module, pipe, plain = nets("always")
    ran = []
    getattr(module, register)(lambda *_: ran.append(1))
    x = torch.randn(6, 4)
    pipe.train_step(x, x, nn.functional.mse_loss)
    nn.functional.mse_loss(plain(x), x).backward()
    assert ran == [1]
    assert_same_gradients(module, plain)
    for options in ({"loss_over": "micro_batch"}, {"schedule": "gpipe_zero_bubble"}, {"two_pass": True}):
        with pytest.raises(RuntimeError, match="the wrapped module has forward or backward hooks, which train_step"):
            pipe.train_step(x, x, nn.functional.mse_loss, **options)


@every_keep
@pytest.mark.parametrize("inside", [True, False])
def test_scripted_cells(keep, inside):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        module = ScriptedInside() if inside else nn.Sequential(*(torch.jit.script(nn.Linear(4, 4)) for _ in range(3)))
    pipe = make_pipe(module, checkpoint=keep)
    x = torch.randn(6, 4)
    pipe(x).square().sum().backward()
    found = gradients(module)
    module.zero_grad()
    (module.blocks if inside else module)(x).square().sum().backward()
    for name, value in gradients(module).items():
        torch.testing.assert_close(found[name], value)


class Casts(nn.Module):
    """Under an autocast of its own it uses a weight several times."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            self.cached = torch.is_autocast_cache_enabled()
            for _ in range(4):
                x = torch.tanh(x @ self.weight)
        return x.float()


# Torch keeps the cast weights of all threads in one place, and the first to leave its autocast drops them.
def test_cells_with_an_autocast_of_their_own_have_the_same_bits_for_every_number_of_stages():
    found = []
    for balance in [[4], *[[1, 1, 1, 1]] * 5]:
        torch.manual_seed(1)
        module = nn.Sequential(*(Casts() for _ in range(4)))
        make_pipe(module, balance, chunks=8)(torch.randn(16, 4)).square().sum().backward()
        found.append(gradients(module))
        assert not any(cell.cached for cell in module)
    for other in found[1:]:
        assert_same(other, found[0])
    assert torch.is_autocast_cache_enabled()


def test_a_loss_that_calls_its_own_pipe():
    module, pipe, _ = nets("always")
    x = torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="the pipe is called from within its own mini-batch, by a cell or by"):
        pipe.train_step(x, x, lambda y, t: (pipe(t) - y).square().mean(), "micro_batch")
    pipe.train_step(x, x, lambda y, t: (module(t) - y).square().mean(), "micro_batch")
    pipe.train_step(x, x, lambda y, t: (pipe(t) - y).square().mean())
