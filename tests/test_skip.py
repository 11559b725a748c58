"""Skip connections: values that go straight from the stage that has them to the stage that needs them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from nets import Apply, assert_same, compositions, gradients, make_pipe
from torch import nn
from worlds import World

from gpipe.distributed import DistributedGPipe
from gpipe.skip import Namespace, pop, skippable, stash, verify_skippables


@skippable(stash=["early"])
class Stash(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        y = self.layer(x)
        yield stash("early", y)
        return torch.tanh(y)


@skippable(stash=["whole", "again", "flag", "count"])
class StashMany(nn.Module):
    """One tensor under two names, which is the output too; None; whole numbers."""

    def forward(self, x):
        yield stash("whole", x)
        yield stash("again", x)
        yield stash("flag", None)
        yield stash("count", (x > 0).sum(1))
        return x


@skippable(pop=["early", "again"])
class Pop(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        early = yield pop("early")
        again = yield pop("again")
        return self.dropout(self.layer(x)) * early + again / 3 + 0.1 * early


@skippable(pop=["whole", "flag", "count"])
class PopMany(nn.Module):
    def forward(self, x):
        whole = yield pop("whole")
        count = yield pop("count")
        assert (yield pop("flag")) is None
        return x * whole + whole.sin() + whole.exp() * 0.1 + count[:, None]


def net():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Pop()))  # nested in containers
    return nn.Sequential(nn.Linear(4, 4), Stash(), StashMany(), nn.Linear(4, 4), inner, nn.Linear(4, 4), PopMany())


def data(rows=7):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))


def squared(y, t):
    return (y - t).square().mean()


def trained(balance, keep, options, rows=7):
    module = net()
    pipe = make_pipe(module, balance, chunks=4, checkpoint=keep)
    optimizer = torch.optim.AdamW(pipe.parameters(), 0.01)
    losses = []
    for n in (rows, rows, 3):
        optimizer.zero_grad()
        losses.append(pipe.train_step(data(n), -data(n), squared, **options))
        optimizer.step()
    return dict(enumerate(losses)) | module.state_dict()


GPIPE = {"schedule": "gpipe"}
SPLIT = {"schedule": "gpipe_zero_bubble"}
ONE_F_ONE_B = {"schedule": "one_f_one_b", "loss_over": "micro_batch"}
ZERO_BUBBLE = {"schedule": "zero_bubble_h1", "loss_over": "micro_batch"}
TWO_PASS = {"two_pass": True}


@pytest.mark.parametrize("options", [GPIPE, SPLIT, ONE_F_ONE_B, ZERO_BUBBLE, TWO_PASS])
def test_the_same_bits_for_every_division_and_keep(options):
    expected = trained([7], 99, options)
    divisions = list(compositions(7))
    for balance in [*divisions[:: 3 if options is GPIPE else 9], [1] * 7]:
        for keep in (0, 1, 99):
            assert_same(trained(balance, keep, options), expected, f"{balance}, keep {keep}")


def test_gradients_are_those_of_the_plain_module():
    module = net().eval()
    plain = copy.deepcopy(module)
    x, z = data().requires_grad_(), data().requires_grad_()
    plain(z).square().sum().backward()
    make_pipe(module, [2, 1, 2, 2], chunks=1)(x).square().sum().backward()
    assert_same(gradients(module), gradients(plain))
    assert torch.equal(x.grad, z.grad)


@skippable(stash=["a", "b", "c"])
class StashThrice(nn.Module):
    def forward(self, x):
        x = x * 1.5
        for name in "abc":
            yield stash(name, x)
        return x


def used_twice(name):
    @skippable(pop=[name])
    class Use(nn.Module):
        def forward(self, x):
            value = yield pop(name)
            return x * value.sin() + value.cos()

    return Use()


def test_gradients_are_added_up_in_the_same_order_however_far_they_come():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 64), StashThrice(), *map(used_twice, "cab"), nn.Linear(64, 4))
    found = []
    for balance in compositions(6):
        module.zero_grad()
        make_pipe(module, balance, chunks=1, checkpoint="never").train_step(data(64), -data(64), squared)
        found.append(gradients(module))
    for own in found:
        assert_same(own, found[0])


def test_names_of_the_state_stay_and_a_pickle_works():
    module = net()
    assert "1.layer.weight" in module.state_dict()
    assert "4.1.1.layer.weight" in module.state_dict()
    again = pickle.loads(pickle.dumps(module)).eval()
    assert torch.equal(again(data()), module.eval()(data()))


def test_forward_alone_and_without_gradients():
    module = net().eval()
    pipe = make_pipe(module, [2, 3, 2], chunks=3)
    with torch.no_grad():
        torch.testing.assert_close(pipe(data()), module(data()))
    with torch.inference_mode():
        torch.testing.assert_close(pipe(data()), module(data()))


def test_a_second_backward_of_the_same_graph():
    module = net().eval()
    pipe = make_pipe(module, [2, 3, 2], chunks=2, checkpoint=1)
    loss = pipe(data()).square().sum()
    loss.backward(retain_graph=True)
    once = gradients(module)
    loss.backward()
    assert_same(gradients(module), {name: g + g for name, g in once.items()})


@skippable(pop=["early"])
class Writes(nn.Module):
    def forward(self, x):
        early = yield pop("early")
        early += 1
        x *= 2
        return early * x


@skippable(stash=["early"])
class StashOutput(nn.Module):
    def forward(self, x):
        y = x + 0
        yield stash("early", y)
        return y


def test_whoever_receives_a_value_may_write_to_it():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), StashOutput(), Apply(lambda x: x.mul_(3)), nn.Identity(), Writes())

    with pytest.raises(RuntimeError, match=r"the stashed 'early' was modified in place before it was popped"):
        build()(data())
    with torch.no_grad():
        y = build()[0](data())
        expected = (y + 1) * (y * 6)
        for _ in range(5):
            assert torch.equal(make_pipe(build(), [2, 1, 1, 1], chunks=1)(data()), expected)


def test_modified_within_the_stage_that_stashes():
    module = nn.Sequential(StashOutput(), Apply(lambda x: x.mul_(3)), nn.Identity(), Writes())
    with pytest.raises(RuntimeError, match=r"'early' was modified in place.*: stash a clone") as caught:
        make_pipe(module, [2, 2], chunks=1)(data())
    assert any("stage 0" in note for note in caught.value.__notes__)


def test_a_value_is_freed_after_its_last_use():
    alive = []

    @skippable(stash=["x"])
    class Give(nn.Module):
        def forward(self, x):
            given = x * 2
            alive.append(weakref.ref(given))
            yield stash("x", given)
            return x

    @skippable(pop=["x"])
    class Take(nn.Module):
        def forward(self, x):
            return x + (yield pop("x"))

    pipe = make_pipe(nn.Sequential(Give(), nn.Identity(), Take(), Apply(lambda x: x)), [1, 1, 1, 1], chunks=4)
    y = pipe(data())
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    del y


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    world = World(3)
    yield world
    world.close()


def train_on_ranks(rank, balance, options):
    pipe = DistributedGPipe(net(), balance, chunks=4, loss_fn=squared, seed=7, **options)
    optimizer = torch.optim.AdamW(pipe.parameters(), 0.01)
    losses = []
    for n in (7, 7, 3):
        optimizer.zero_grad()
        losses.append(pipe.train_step(data(n), -data(n)))
        optimizer.step()
    return dict(enumerate(losses)) | pipe.state_dict()


@pytest.mark.parametrize("options", [GPIPE, ONE_F_ONE_B, TWO_PASS])
@pytest.mark.parametrize("balance", [[2, 2, 3], [3, 2, 2]])
def test_between_ranks(world, balance, options):
    expected = trained(balance, 1, options)
    found = world.values(train_on_ranks, balance, options)
    assert_same(found[0] | found[1] | found[2], expected)
    assert found[0][2] == found[1][2] == found[2][2]


def test_between_ranks_of_several_stages(world):
    options = {"schedule": "interleaved_one_f_one_b", "loss_over": "micro_batch"}
    expected = trained([1] * 7, 1, ONE_F_ONE_B)
    found = world.values(train_on_ranks, [1, 1, 1, 1, 1, 2], options)
    assert_same(found[0] | found[1] | found[2], expected)


# --- declarations -----------------------------------------------------------------------------------------------------


def test_every_mismatch_is_listed():
    module = nn.Sequential(Pop(), Stash(), nn.Sequential(Stash()), PopMany())
    with pytest.raises(TypeError) as caught:
        verify_skippables(module)
    for text in (
        "'early' is stashed by cell '1' and again by '2'",
        "'again' is popped by cell '0' and stashed by none",
        "'whole' is popped by cell '3' and stashed by none",
        "'early' is popped by cell '0' before cell '1' stashes it",
        "Declare every name once in stash=[...]",
    ):
        assert text in str(caught.value)
    with pytest.raises(TypeError, match="skip connections do not match: 'early' is stashed by cell '0' and popped by"):
        make_pipe(nn.Sequential(Stash(), nn.Linear(4, 4)), [1, 1])
    verify_skippables(net())


@skippable(pop=["early"])
class Add(nn.Module):
    def forward(self, x):
        return x + (yield pop("early"))


def test_namespaces_keep_the_same_layers_apart():
    def block():
        namespace = Namespace()
        return [Stash().isolate(namespace), nn.Linear(4, 4), Add().isolate(copy.deepcopy(namespace), only=["early"])]

    torch.manual_seed(0)
    outer, inner = block(), block()
    module = nn.Sequential(*outer[:2], *inner, *outer[2:])
    verify_skippables(module)
    x = data()
    y = outer[0].layer(x)
    z = inner[0].layer(outer[1](y.tanh()))
    expected = inner[1](z.tanh()) + z + y
    assert torch.equal(module(x), expected)
    assert torch.equal(make_pipe(copy.deepcopy(module), [1, 2, 2, 1], chunks=1)(x), expected)
    assert len({Namespace(), Namespace()}) == 2
    with pytest.raises(ValueError, match=r"only: 'late' is neither stashed nor popped by Add, which has 'early'"):
        Add().isolate(Namespace(), only=["late"])


def broken(forward, **declared):
    return skippable(**declared)(type("Broken", (nn.Module,), {"forward": forward}))()


def undeclared_stash(self, x):
    yield stash("b", x)
    return x


def undeclared_pop(self, x):
    return x + (yield pop("b"))


def twice(self, x):
    yield stash("a", x)
    yield stash("a", x)
    return x


def number(self, x):
    yield x
    return x


def no_tensor(self, x):
    yield stash("a", 3)
    return x


@pytest.mark.parametrize(
    ("forward", "declared", "error", "message"),
    [
        (undeclared_stash, {"stash": ["a"]}, RuntimeError, r"stashes 'b', which it does not declare: add it to stash="),
        (undeclared_pop, {"pop": ["a"]}, RuntimeError, r"pops 'b', which it does not declare: add it to pop="),
        (undeclared_pop, {"pop": ["b"]}, RuntimeError, r"pops 'b', but no cell before has stashed it"),
        (twice, {"stash": ["a"]}, RuntimeError, r"stashed or popped 'a' twice: do it once"),
        (number, {"stash": ["a"]}, TypeError, r"forward yields tensor.*: yield stash\(name, value\) or pop\(name\)"),
        (no_tensor, {"stash": ["a"]}, TypeError, r"stashes a int as 'a': stash a tensor, or None"),
        (
            lambda self, x: x,
            {"stash": ["a"]},
            RuntimeError,
            r"declares 'a' but did not stash it: .*None where there is",
        ),
        (lambda self, x: x, {"pop": ["a"]}, RuntimeError, r"declares 'a' but did not pop it: yield pop"),
    ],
)
def test_what_forward_may_not_do(forward, declared, error, message):
    with pytest.raises(error, match=message):
        broken(forward, **declared)(torch.ones(2))


def test_what_the_decorator_refuses():
    with pytest.raises(TypeError, match=r'stash must be a list of names, such as stash=\["features"\], got \'abc\''):
        skippable(stash="abc")
    with pytest.raises(ValueError, match="'a': a module cannot stash and pop the same name: use two names"):
        skippable(stash=["a"], pop=["a"])
    with pytest.raises(TypeError, match="skippable decorates a class of modules, got"):
        skippable(stash=["a"])(nn.Linear(2, 2))
