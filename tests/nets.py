"""Small nets, pipes of them, and the plain loop a pipe is compared with."""

import itertools
import threading

import pytest
import torch
from torch import nn

from gpipe import GPipe, cell_seed, is_recomputing
from gpipe.microbatch import gather, scatter
from gpipe.partitioning.cells import cells_of


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("gpipe-worker")]


def loud(model: nn.Module) -> nn.Module:
    """Make every parameter matter: published start values leave biases zero and gains one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    return model


class Apply(nn.Module):
    """A cell that calls a function with its input and the modules given."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def compositions(cells):
    """All ways to group that many cells into consecutive stages."""
    return [
        [right - left for left, right in itertools.pairwise((0, *cuts, cells))]
        for count in range(cells)
        for cuts in itertools.combinations(range(1, cells), count)
    ]


def linears(cells=3, width=4):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(cells)))


def make_pipe(module, balance=None, chunks=3, checkpoint="except_last", seed=7, **options):
    balance = [1] * len(cells_of(module)) if balance is None else balance
    return GPipe(
        module, balance, devices=["cpu"] * len(balance), chunks=chunks, checkpoint=checkpoint, seed=seed, **options
    )


class PlainLoop:
    """What a pipe is to equal to the bit: every micro-batch through all cells, in one graph of autograd."""

    def __init__(self, module, chunks=3, seed=7):
        self.module, self.chunks, self.seed, self.step = module, chunks, seed, 0

    def __call__(self, inputs):
        outputs = []
        for m, value in enumerate(scatter(inputs, self.chunks)):
            for i, (_, cell) in enumerate(cells_of(self.module)):
                torch.manual_seed(cell_seed(self.seed, self.step, m, i))
                value = cell(value)
            outputs.append(value)
        self.step += self.module.training
        return gather(outputs)


def gradients(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_same(found, expected, where=""):
    """Two dicts or sequences of tensors are equal to the bit."""
    pairs = expected.items() if isinstance(expected, dict) else enumerate(expected)
    assert len(found) == len(expected)
    for key, value in pairs:
        if value is None:
            assert found[key] is None, f"{where}: {key} has a value"
        else:
            assert found[key] is not None, f"{where}: {key} is None"
            assert torch.equal(found[key], value), f"{where}: {key} differs by {(found[key] - value).abs().max()}"


def train(run, module, inputs, loss_fn, steps=2, rate=0.05):
    """A few steps of gradient descent; gives the outputs, the last gradients and the state after."""
    outputs = []
    optimizer = torch.optim.SGD(module.parameters(), rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        output = run(inputs)
        loss_fn(output).backward()
        optimizer.step()
        outputs.append(output)
    state = {f"state {k}": v for k, v in module.state_dict().items()}
    return {f"gradient {k}": v for k, v in gradients(module).items()} | state


def assert_as_plain(make, inputs, loss_fn=lambda y: y.square().sum(), chunks=3, balances=None, keeps=(0, 1, 99)):
    """Training ``make()`` as a pipe gives the bits of the plain loop, for every balance and keep."""
    torch.manual_seed(1)
    module = make()
    expected = train(PlainLoop(module, chunks), module, inputs, loss_fn)
    for balance in balances or compositions(len(cells_of(module))):
        for keep in keeps:
            torch.manual_seed(1)
            module = make()
            found = train(make_pipe(module, balance, chunks, keep), module, inputs, loss_fn)
            assert_same(found, expected, f"balance {balance}, keep {keep}")


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


class Island(nn.Module):
    """A cell that leaves the caller's autocast."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.linear(x.float())


class FrozenNorms(nn.Sequential):
    """Batch norm stays in eval mode, by a ``train`` of its own."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


class Shifted(nn.Module):
    """Its cells are made anew, and share its buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.linspace(0, 1, 4))

    def cells(self):
        shift = Apply(lambda x, part: x + part.shift, nn.Module())
        shift.parts[0].register_buffer("shift", self.shift)
        return [self.linear, shift]


def accelerator(index=0):
    """A device of this machine's accelerators; of the CPU where it has none, for skipped tests."""
    kind = torch.accelerator.current_accelerator()
    return torch.device(kind.type, index) if kind else torch.device("cpu")


class Bomb(nn.Module):
    """A cell that raises in one phase, at its n-th call in it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.error = None
        self.phase = "forward"
        self.calls = 0

    def arm(self, error, phase, calls=1):
        self.error, self.phase, self.calls = error, phase, calls

    def reached(self, phase):
        if self.error is not None and phase == self.phase:
            self.calls -= 1
            if not self.calls:
                error, self.error = self.error, None
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame

    def forward(self, x):
        self.reached("recompute" if is_recomputing() else "forward")
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda g: self.reached("backward"))
        return y


class Sometimes(nn.Module):
    """A weight that only inputs above zero use, one that nobody does, and a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.rare = nn.Parameter(torch.ones(2))
        self.never = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.seen += x.sum()
        return x * self.weight + (self.rare if x.sum().item() > 0 else 0)
