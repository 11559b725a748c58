"""GPipe as a module: arguments, attributes, names of parameters, copies."""

import copy
import gc
import io
import pickle
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
from nets import Apply, Shifted, assert_same, gradients, linears, make_pipe
from torch import nn

from gpipe import GPipe
from gpipe.partitioning.cells import cells_of
from gpipe.testing import assert_exact

CPU2 = ["cpu", "cpu"]


def test_attributes():
    pipe = GPipe(linears(), [2, 1], devices=CPU2, chunks=4, checkpoint="always", deferred_batch_norm=True, seed=5)
    assert pipe.balance == [2, 1]
    assert pipe.devices == [torch.device("cpu")] * 2
    assert pipe.chunks == 4
    assert pipe.checkpoint == "always"
    assert pipe.deferred_batch_norm is True
    assert pipe.seed == 5
    assert pipe.step == 0
    assert "balance=[2, 1], devices=['cpu', 'cpu'], chunks=4, checkpoint='always'" in repr(pipe)


def test_defaults():
    pipe = GPipe(linears(), [3])
    assert (pipe.chunks, pipe.checkpoint, pipe.deferred_batch_norm) == (1, "except_last", False)


def test_takes_an_iterator_of_devices_and_balance():
    pipe = GPipe(linears(), iter([1, 2]), devices=iter(CPU2))
    assert pipe.balance == [1, 2]
    assert GPipe(linears(), devices=iter(CPU2)).balance in ([1, 2], [2, 1])


def test_step_counts_mini_batches_in_training():
    pipe = make_pipe(linears())
    for _ in range(2):
        pipe(torch.ones(3, 4))
    assert pipe.step == 2
    pipe.eval()
    pipe(torch.ones(3, 4))
    assert pipe.step == 2


def test_len_index_slice_iteration():
    module = linears(4)
    pipe = make_pipe(module, [2, 2])
    assert len(pipe) == 4
    assert [pipe[i] for i in range(4)] == list(module)
    assert pipe[-1] is module[-1]
    assert list(pipe) == list(module)
    assert list(pipe[1:3]) == list(module[1:3])
    for i in (4, -5):
        with pytest.raises(IndexError, match=f"the pipe has 4 cells, there is none at index {i}"):
            pipe[i]


@pytest.mark.parametrize(
    "move",
    [
        lambda pipe: pipe.to("cpu"),
        lambda pipe: pipe.to(torch.device("cpu"), torch.float64),
        lambda pipe: pipe.to(torch.ones(1)),
        lambda pipe: pipe.to(device="meta"),
        lambda pipe: pipe.cuda(),
        lambda pipe: pipe.cuda(0),
        lambda pipe: pipe.cpu(),
    ],
)
def test_cannot_be_moved(move):
    with pytest.raises(TypeError, match=r"stay on their own devices \(cpu, cpu, cpu\) and cannot all be moved"):
        move(make_pipe(linears()))


@pytest.mark.parametrize(
    "cast", [lambda p: p.to(torch.float64), lambda p: p.double(), lambda p: p.to(dtype=torch.float64)]
)
def test_can_be_cast(cast):
    module = linears()
    pipe = make_pipe(module)
    assert cast(pipe) is pipe
    output = pipe(torch.ones(3, 4, dtype=torch.float64))
    assert output.dtype == torch.float64
    output.sum().backward()
    assert module[0].weight.grad.dtype == torch.float64


def test_empty_module():
    pipe = GPipe(nn.Sequential(), [])
    x = torch.ones(2, 3)
    assert pipe(x) is x
    assert len(pipe) == 0
    assert pipe.balance == pipe.devices == []
    assert GPipe(nn.Sequential()).balance == []
    x.requires_grad_()
    assert pipe.train_step(x, torch.zeros(2, 3), nn.functional.mse_loss, "micro_batch") == 1.0
    assert x.grad is not None


def test_default_balance_is_by_parameter_count():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(40, 40))
    assert GPipe(module, devices=CPU2).balance == [3, 1]
    assert GPipe(module, devices=["cpu"] * 4).balance == [1, 1, 1, 1]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="devices are then the accelerators")
def test_default_devices_are_one_cpu_per_stage():
    assert GPipe(linears(), [1, 1, 1]).devices == [torch.device("cpu")] * 3
    assert GPipe(linears()).balance == [3]  # as many as torch.get_num_threads()


def net(**options):
    return linears(options.pop("cells", 3), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"module": nn.Linear(2, 2)}, TypeError, "wraps an nn.Sequential, or a module with a method cells"),
        ({"balance": [2, 2]}, ValueError, r"the module has 3, balance \[2, 2\] sums to 4.*try balance=\[2, 1\]"),
        ({"balance": [3, 0]}, ValueError, r"at least one cell, got balance \[3, 0\]: leave the empty stage out"),
        ({"balance": [4, -1]}, ValueError, "at least one cell"),
        ({"balance": [1.5, 1.5]}, TypeError, r"balance must be ints.*got \[1.5, 1.5\]"),
        ({"balance": [True, 2]}, TypeError, "balance must be ints"),
        ({"balance": 3}, TypeError, "balance must be a list of ints.*got 3"),
        ({"balance": []}, ValueError, "the module has 3"),
        ({"devices": ["cpu"]}, IndexError, r"too few devices to hold the stages: 2 stages, 1 devices \(cpu\)"),
        ({"devices": []}, IndexError, "too few devices"),
        ({"devices": "cpu"}, TypeError, r"devices must be a list.*got 'cpu': \['cpu'\]\?"),
        ({"devices": torch.device("cpu")}, TypeError, "devices must be a list"),
        ({"balance": None, "devices": []}, IndexError, "devices is empty"),
        ({"balance": None, "devices": ["cpu"] * 4}, ValueError, "4 devices for 3 cells"),
        ({"chunks": 0}, ValueError, "must be at least 1, got 0"),
        ({"chunks": 2.0}, TypeError, "chunks must be an int.*got float 2.0"),
        ({"chunks": True}, TypeError, "chunks must be an int.*got bool True"),
        ({"checkpoint": "sometimes"}, ValueError, "'always', 'except_last', 'never'.*got 'sometimes'"),
        ({"checkpoint": 1.0}, TypeError, "'always', 'except_last', 'never'.*got 1.0"),
        ({"checkpoint": True}, TypeError, "got True"),
        ({"checkpoint": None}, TypeError, "got None"),
        ({"checkpoint": -1}, ValueError, "got -1"),
        ({"checkpoint": [1, 2, 3]}, ValueError, "checkpoint gives 3 numbers for 2 stages"),
        ({"seed": "a"}, TypeError, "seed must be an int.*got 'a'"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    module = linears()
    keywords = {"module": module, "balance": [2, 1], "devices": CPU2} | arguments
    with pytest.raises(error, match=match):
        GPipe(**keywords)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_refuses_a_sequential_with_a_forward_of_its_own():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    with pytest.raises(TypeError, match=r"Residual is an nn.Sequential with a forward\(\) of its own"):
        GPipe(Residual(nn.Linear(2, 2)), [1])


# A child of this name was called as if it were the method cells().
def test_a_child_may_be_named_cells():
    pipe = GPipe(nn.Sequential(OrderedDict(cells=nn.Linear(2, 2), more=nn.Linear(2, 2))), [1, 1], devices=CPU2)
    assert pipe(torch.ones(2, 2)).shape == (2, 2)


def test_refuses_parameters_of_two_stages():
    tied = nn.Linear(4, 4)
    module = nn.Sequential(tied, nn.ReLU(), tied)
    with pytest.raises(ValueError, match=r"stage 0 uses one as '0.weight' and stage 1 as '2.weight'.*on one stage"):
        make_pipe(module, [2, 1])
    assert_exact(module, torch.randn(6, 4), stages=[1])


# Two stages updated one running mean at the same time.
def test_refuses_buffers_of_two_stages():
    norm = nn.BatchNorm1d(4, affine=False)
    module = nn.Sequential(norm, nn.Linear(4, 4), norm)
    with pytest.raises(ValueError, match=r"stage 0 uses one as '0.running_mean' and stage 1 as '2.running_mean'"):
        make_pipe(module, [2, 1], deferred_batch_norm=True)
    assert not norm._forward_pre_hooks
    assert_exact(module, torch.randn(12, 4), stages=[1])


def test_a_module_without_state_may_be_in_two_stages():
    drop = nn.Dropout(0.5)
    assert_exact(nn.Sequential(nn.Linear(4, 4), drop, nn.Linear(4, 4), drop), torch.randn(6, 4), stages=[1, 2, 4])


# The stages went on with the old cell, the optimizer with the new.
def test_notices_replaced_cells():
    pipe = make_pipe(linears())
    pipe.module[1] = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="replaced after wrapping: wrap the module again"):
        pipe(torch.ones(3, 4))


class Tower(nn.Module):
    """Names that are no flat sequence; a forward that loops over cells."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.blocks = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.register_buffer("shift", torch.tensor([1.0]))

    def cells(self):
        head = Apply(lambda x, part: x * part.weight, nn.Module())
        head.parts[0].weight = self.scale
        return [*self.blocks.values(), head]

    def forward(self, x):
        for cell in self.cells():
            x = cell(x)
        return x


def test_a_module_with_cells():
    module = Tower()
    x = torch.randn(6, 4)
    expected = module(x)
    expected.sum().backward()
    wanted = gradients(module)
    module.zero_grad()
    pipe = make_pipe(module, [1, 2])
    assert len(pipe) == 3
    output = pipe(x)
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    torch.testing.assert_close(gradients(module), wanted)
    assert list(pipe.state_dict()) == list(module.state_dict())
    assert pipe.scale is module.scale
    assert [name for name, _ in pipe.named_parameters()] == [name for name, _ in module.named_parameters()]
    pipe.double()
    assert pipe(x.double()).dtype == torch.float64
    assert_exact(Tower(), x, stages=[1, 2, 3])


# The pipe went on with the old cell, while parameters() and state_dict() showed the new one.
@pytest.mark.parametrize("balance", [[3], [1, 2]])
def test_a_cell_or_what_holds_it_may_not_be_replaced(balance):
    for replace in (
        lambda tower: tower.blocks.update({"second": nn.Linear(4, 2)}),
        lambda tower: setattr(tower, "blocks", copy.deepcopy(tower.blocks)),
    ):
        tower = Tower()
        pipe = make_pipe(tower, balance)
        pipe(torch.ones(6, 4))
        replace(tower)
        with pytest.raises(RuntimeError, match="replaced after wrapping: wrap the module again"):
            pipe(torch.ones(6, 4))


# A cast reached the module's buffer alone, and what was loaded after it no cell.
def test_a_buffer_that_new_cells_share_is_cast_and_loaded():
    module = Shifted()
    pipe = make_pipe(module, [1, 1])
    pipe.double()
    x = torch.ones(6, 4, dtype=torch.float64)
    assert pipe(x).dtype == torch.float64
    module.load_state_dict({**module.state_dict(), "shift": torch.full((4,), 9.0, dtype=torch.float64)})
    assert torch.equal(pipe(x), module.linear(x) + 9)


def test_cells_must_hold_the_parameters():
    class Forgetful(Tower):
        def cells(self):
            return [self.blocks["first"]]

    class Wrong(Tower):
        def cells(self):
            return ["first"]

    with pytest.raises(ValueError, match="must hold exactly its parameters: 3 of them are in no cell, 0 in cells only"):
        make_pipe(Forgetful(), [1])
    with pytest.raises(TypeError, match=r"must return nn.Modules, item 0 is str"):
        make_pipe(Wrong(), [1])


def test_train_and_eval_reach_cells_made_anew():
    module = Tower()
    pipe = make_pipe(module, [1, 2])
    for mode in (False, True):
        pipe.train(mode)
        assert {m.training for m in (pipe, module, *pipe, *module.modules())} == {mode}


def test_state_dict_has_the_modules_names_and_loads_across_balances():
    source = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    pipe = make_pipe(source, [1, 2])
    pipe(torch.randn(9, 4))
    state = pipe.state_dict()
    assert list(state) == list(source.state_dict())
    assert_same(state, source.state_dict())

    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    make_pipe(other, [2, 1]).load_state_dict(state)
    assert_same(other.state_dict(), state)
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    plain.load_state_dict(state)
    make_pipe(plain, [1, 1, 1]).load_state_dict(other.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"more\""):
        pipe.load_state_dict(state | {"more": torch.ones(1)})


def test_load_state_dict_may_assign():
    module = linears()
    pipe = make_pipe(module)
    state = linears().state_dict()
    pipe.load_state_dict(state, assign=True)
    assert module[0].weight.data_ptr() == state["0.weight"].data_ptr()
    torch.testing.assert_close(pipe(torch.ones(3, 4)), module(torch.ones(3, 4)))
    pipe(torch.ones(3, 4)).sum().backward()
    assert pipe[0].weight.grad is not None


# The module's own way to save and load was passed over.
def test_a_modules_own_saving_is_used():
    class Versioned(Tower):
        def get_extra_state(self):
            return "as of 2020"

        def set_extra_state(self, state):
            self.loaded = state

    module = Versioned()
    state = make_pipe(module, [3]).state_dict()
    assert list(state) == list(module.state_dict())
    assert state["_extra_state"] == "as of 2020"
    other = Versioned()
    make_pipe(other, [1, 2]).load_state_dict(state)
    assert other.loaded == "as of 2020"


def adam_steps(pipe, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        pipe(torch.full((6, 4), 1.0 + step)).square().mean().backward()
        optimizer.step()


def test_optimizer_state_loads_across_balances():
    expected = linears()
    pipe = make_pipe(expected, [3])
    adam_steps(pipe, torch.optim.Adam(pipe.parameters()), 4)

    torch.manual_seed(0)
    first = linears()
    pipe = make_pipe(first, [1, 2])
    optimizer = torch.optim.Adam(pipe.parameters())
    adam_steps(pipe, optimizer, 4)
    second = linears()
    second.load_state_dict(first.state_dict())
    pipes = [pipe, make_pipe(second, [2, 1])]
    other = torch.optim.Adam(second.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in zip(pipes, (optimizer, other), strict=True):
        adam_steps(each, its, 2)
    assert_same(second.state_dict(), first.state_dict())
    assert not torch.equal(expected[0].weight, first[0].weight)


def drops():
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4))


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda pipe: pickle.loads(pickle.dumps(pipe)), id="pickle"),
    ],
)
def test_copies_of_a_pipe_that_has_run(copied):
    pipe = make_pipe(drops(), [2, 2], deferred_batch_norm=True)
    x = torch.randn(6, 4)
    pipe(x).sum().backward()
    twin = copied(pipe)
    assert twin.module is not pipe.module
    assert twin.module[0].weight is twin[0].weight is dict(twin.named_parameters())["0.weight"]
    assert twin[0].weight.data_ptr() != pipe[0].weight.data_ptr()
    for each in (pipe, twin):
        optimizer = torch.optim.Adam(each.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert twin.step == pipe.step == 3
    assert_same(twin.state_dict(), pipe.state_dict())


def test_torch_save():
    pipe = make_pipe(linears(), [2, 1])
    file = io.BytesIO()
    torch.save(pipe, file)
    file.seek(0)
    x = torch.randn(3, 4)
    assert torch.equal(torch.load(file, weights_only=False)(x), pipe(x))


def test_hooks_of_the_wrapped_module_and_its_cells():
    module = linears()
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(tuple(output.shape)))
    module[1].register_forward_pre_hook(lambda m, args: seen.append("cell"))
    make_pipe(module, checkpoint="never")(torch.ones(6, 4))
    assert seen == ["cell", "cell", "cell", (6, 4)]


def test_apply_and_requires_grad():
    module = linears()
    pipe = make_pipe(module)
    pipe.requires_grad_(False)
    assert not any(p.requires_grad for p in module.parameters())
    pipe.apply(lambda m: isinstance(m, nn.Linear) and nn.init.zeros_(m.weight))
    assert not module[2].weight.any()


def test_timeline_of_the_latest_mini_batch():
    pipe = make_pipe(linears(2), checkpoint=2)
    assert pipe.timeline.workers == ()
    pipe(torch.ones(6, 4)).sum().backward()
    texts = [[str(span.action) for span in worker] for worker in pipe.timeline.workers]
    assert texts == [
        ["0F0", "0F1", "0F2", "0B2", "0B1", "0R0", "0B0"],
        ["1F0", "1F1", "1F2", "1B2", "1B1", "1R0", "1B0"],
    ]
    assert all(s.start <= s.end for worker in pipe.timeline.workers for s in worker)
    assert all(0 < busy <= 1 for busy in pipe.timeline.busy)
    assert pipe.timeline.makespan > 0
    lines = pipe.timeline.render(40).splitlines()
    assert [line.split("|")[0] for line in lines] == ["worker 0 ", "worker 1 "]
    assert all(len(line.split("|")[1]) == 40 for line in lines)


def test_workers_share_the_callers_intra_op_threads():
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        ask = Apply(lambda x: seen.append(torch.get_num_threads()) or x)
        pipe = make_pipe(nn.Sequential(ask, nn.ReLU()), chunks=1)
        pipe(torch.ones(1, 4))
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert seen == [2, 5]
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


def test_a_dropped_pipe_is_freed_without_garbage_collection():
    pipe = make_pipe(linears())
    pipe(torch.ones(3, 4)).sum().backward()
    gone = weakref.ref(pipe)
    gc.disable()
    try:
        del pipe
        assert gone() is None
    finally:
        gc.enable()


def test_the_output_outlives_the_pipe():
    module = linears()
    loss = make_pipe(module, checkpoint="always")(torch.ones(3, 4)).sum()
    loss.backward()
    assert module[0].weight.grad is not None


def test_cells_are_the_children():
    module = nn.Sequential(OrderedDict(a=nn.Linear(2, 2), b=nn.ReLU()))
    assert cells_of(module) == [("a", module.a), ("b", module.b)]


def test_names_that_a_pipe_needs_for_itself():
    module = nn.Sequential(nn.Linear(4, 4))
    module.register_buffer("step", torch.zeros(()))
    with pytest.raises(ValueError, match="the module has something named 'step', which is an attribute of the pipe"):
        GPipe(module, [1], devices=["cpu"])
    GPipe(nn.Sequential(module), [1], devices=["cpu"])(torch.ones(2, 4))
