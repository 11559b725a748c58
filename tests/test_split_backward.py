"""A backward in two parts gives what a whole one gives, for any module, and puts the weights' products off."""

import warnings

import pytest
import torch
from nets import Apply, assert_same, gradients, make_pipe
from torch import nn
from torch.utils.checkpoint import checkpoint

from gpipe.schedule import Action, Kind, Schedule
from gpipe.split_backward import CannotSplit, Split


class Twice(torch.autograd.Function):
    """Counts how often it goes backward."""

    runs = 0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        Twice.runs += 1
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return Twice.apply(x, self.weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.linear(self.linear(x).tanh()) + nn.functional.linear(x, self.linear.weight.t())


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4)
    )


def attention():
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(),
    )


def recurrent():
    return nn.Sequential(nn.Unflatten(1, (2, 2)), nn.LSTM(2, 3), Apply(lambda out: out[0].flatten(1)), nn.Linear(6, 4))


def frozen():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    module[1].requires_grad_(False)
    module[3].weight.requires_grad_(False)
    return module


def sparse():
    return nn.Sequential(
        Apply(lambda x, e: e(x.argmax(1)) * x.sum(1, keepdim=True), nn.Embedding(4, 4, sparse=True)), nn.Linear(4, 4)
    )


NETS = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4, bias=False)),
    "without biases": lambda: nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.Linear(4, 4, bias=False)
    ),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4)),
    "convolution": convolution,
    "attention": attention,
    "recurrent": recurrent,
    "convolutions of all kinds": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.Conv1d(2, 4, 3, padding=2, dilation=2, groups=2),
        nn.ConvTranspose1d(4, 2, 2, stride=2, output_padding=1, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(10, 4),
    ),
    "factors": lambda: Apply(
        lambda x, a: torch.addmm(a.bias, torch.mm(a.weight, x.t()).t(), a.weight.clone(), alpha=3, beta=2),
        nn.Linear(4, 4),
    ),
    "rows and columns": lambda: Apply(lambda x, a, b: x @ a.weight @ b.weight.t(), nn.Linear(4, 4), nn.Linear(4, 4)),
    "a function of the user's": lambda: nn.Sequential(nn.Linear(4, 4), Scale(), nn.Linear(4, 4)),
    "a weight used three times": Tied,
    "frozen parts": frozen,
    "sparse gradients": sparse,
    "parameters alone": lambda: Apply(lambda x, cell: cell.weight.sum() + x.detach() @ cell.weight, nn.Linear(4, 4)),
    "bias as big as the output": lambda: Apply(
        lambda x, cell: x @ cell.weight + cell.weight[: len(x)], nn.Linear(4, 4)
    ),
    "checkpoint": lambda: nn.Sequential(nn.Linear(4, 4), Checkpointed(reentrant=False)),
    "no parameters": lambda: nn.Tanh(),
}


def graph(module, x):
    """The output of a module, and a leaf that all its inputs hang on."""
    start = torch.zeros((), requires_grad=True)
    return module(x + start * 0 if x.requires_grad else x), start


@pytest.mark.parametrize("first", [False, True], ids=["inner stage", "first stage"])
@pytest.mark.parametrize("net", NETS)
def test_both_parts_together_are_the_whole(net, first):
    torch.manual_seed(0)
    module = NETS[net]()
    x = torch.randn(3, 4, requires_grad=not first)
    values = torch.randn(3, 4)
    found = []
    for split in (False, True):
        module.zero_grad()
        x.grad = None
        for _ in range(2):  # the second is added to the first
            output, start = graph(module, x)
            if not output.requires_grad:
                return
            edges = [torch.autograd.graph.get_gradient_edge(output)]
            if split:
                parts = Split(edges, start)
                parts.input_gradient(edges, [values], keep_graph=False)
                parts.weight_gradient()
            else:
                torch.autograd.backward(edges, [values])
        found.append(gradients(module))
    dense = [{k: g.to_dense() if g is not None else None for k, g in one.items()} for one in found]
    assert_same(dense[1], dense[0], net)


def test_the_weights_wait_and_nothing_else_does():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    output, start = graph(module, torch.randn(3, 4, requires_grad=True))
    edges = [torch.autograd.graph.get_gradient_edge(output)]
    parts = Split(edges, start)
    parts.input_gradient(edges, [torch.ones(3, 4)], keep_graph=False)
    waiting = {name for name, p in module.named_parameters() if p.grad is None}
    assert waiting == {"0.weight", "2.weight"}
    assert start.grad is None
    parts.weight_gradient()
    assert all(p.grad is not None for p in module.parameters())


def test_a_users_function_goes_backward_once():
    Twice.runs = 0
    module = nn.Sequential(Scale(), nn.Linear(4, 4))
    output, start = graph(module, torch.randn(3, 4, requires_grad=True))
    edges = [torch.autograd.graph.get_gradient_edge(output)]
    parts = Split(edges, start)
    parts.input_gradient(edges, [torch.ones(3, 4)], keep_graph=False)
    parts.weight_gradient()
    assert Twice.runs == 1


def test_what_cannot_be_split_says_so():
    output, start = graph(Checkpointed(reentrant=True), torch.randn(3, 4, requires_grad=True))
    with pytest.raises(CannotSplit, match="use_reentrant=True"):
        Split([torch.autograd.graph.get_gradient_edge(output)], start)


def split_schedule(stages, micro_batches):
    forward = range(micro_batches)
    return Schedule(
        "split",
        stages,
        micro_batches,
        tuple(
            [Action(k, kind, m) for kind in (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT) for m in forward]
            for k in range(stages)
        ),
    )


def test_a_stage_that_cannot_be_split_goes_backward_whole_and_says_so_once():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Checkpointed(reentrant=True), nn.Linear(4, 4))

    x, y = torch.randn(6, 4), torch.randn(6, 4)
    expected = net()
    make_pipe(expected, checkpoint="never").train_step(x, y, nn.functional.mse_loss)
    module = net()
    pipe = make_pipe(module, checkpoint="never")
    with pytest.warns(UserWarning, match=r"stage 1 .* runs its backward whole, .* use_reentrant=True"):
        pipe.train_step(x, y, nn.functional.mse_loss, schedule="gpipe_zero_bubble")
    module.zero_grad()
    pipe.train_step(x, y, nn.functional.mse_loss, schedule="gpipe_zero_bubble")  # a second warning would be an error
    assert_same(gradients(module), gradients(expected))


def test_retained_graphs_go_backward_again():
    x = torch.randn(6, 4, requires_grad=True)
    found = []
    for schedule in ("gpipe", "gpipe_zero_bubble"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        output = make_pipe(module, checkpoint=1)._run(x, schedule)
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        found.append(gradients(module) | {"x": x.grad.clone()})
        x.grad = None
    assert_same(found[1], found[0])


def test_nothing_is_left_to_warn_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)))
        make_pipe(module).train_step(
            torch.ones(6, 4), torch.ones(6, 4), nn.functional.mse_loss, schedule=split_schedule(2, 3)
        )


# A parameter that a layer uses and a stage hands on lost the gradient that came back for it.
def test_a_parameter_that_is_handed_on_too():
    def make():
        torch.manual_seed(0)
        linear = nn.Linear(4, 4)
        return nn.Sequential(Apply(lambda x, lin: (lin(x), lin.weight), linear), Apply(lambda pair: pair[0] @ pair[1]))

    x, t = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(6, 4)
    found = []
    for schedule in ("one_f_one_b", "zero_bubble_h1"):
        module = make()
        make_pipe(module, chunks=2).train_step(x, t, nn.functional.mse_loss, "micro_batch", schedule=schedule)
        found.append(gradients(module))
    assert_same(found[1], found[0])


def clamped(y):
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return y


def prehooked(y):
    if y.grad_fn is not None:
        y.grad_fn.register_prehook(lambda gradients: tuple(g * 2 for g in gradients))
    return y


class Hooked(nn.Module):
    def __init__(self, kind, hook):
        super().__init__()
        self.layer = nn.Linear(4, 4) if kind == "linear" else nn.Conv1d(4, 4, 1)
        self.kind, self.hook = kind, hook

    def forward(self, x):
        y = self.layer(x if self.kind == "linear" else x[:, :, None])
        return self.hook(y).flatten(1)


# The weight's product was computed from the gradient as it was before the hook.
@pytest.mark.parametrize("schedule", ["gpipe_zero_bubble", "zero_bubble_h1"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
@pytest.mark.parametrize("hook", [clamped, prehooked])
def test_hooks_on_a_layers_output(schedule, kind, hook):
    found = []
    for name in (schedule, "gpipe"):
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(4, 4), Hooked(kind, hook), nn.Tanh(), Hooked(kind, hook))
        pipe = make_pipe(module, [2, 2], checkpoint="never")
        pipe.train_step(X, X, nn.functional.mse_loss, "micro_batch", schedule=name)
        found.append(gradients(module))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, msg=name)


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
