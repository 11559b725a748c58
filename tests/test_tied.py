"""Parameters that cells of several stages share."""

import copy
import gc
import weakref

import pytest
import torch
from nets import Apply, assert_same, compositions, gradients, make_pipe
from torch import nn
from torch.nn.utils import prune

from gpipe import GPipe


class Unembed(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight
        self.bias = nn.Parameter(torch.zeros(len(embedding.weight)))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


def language_model(dropout=0.1):
    torch.manual_seed(0)
    embed = nn.Embedding(11, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
    return nn.Sequential(embed, layer, nn.Linear(8, 8), Unembed(embed))


def tokens():
    return torch.randint(11, (7, 5), generator=torch.Generator().manual_seed(1))


def loss_fn(logits, targets):
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def trained(balance, keep, schedule="gpipe", loss_over="mini_batch", steps=3):
    module = language_model()
    pipe = make_pipe(module, balance, chunks=4, checkpoint=keep)
    optimizer = torch.optim.AdamW(pipe.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        pipe.train_step(tokens(), tokens(), loss_fn, loss_over, schedule=schedule)
        optimizer.step()
    assert module[0].weight is module[3].weight
    return module.state_dict()


@pytest.mark.parametrize(
    ("schedule", "loss_over"),
    [("gpipe", "mini_batch"), ("gpipe_zero_bubble", "mini_batch"), ("zero_bubble_h1", "micro_batch")],
)
def test_the_same_bits_for_every_division(schedule, loss_over):
    expected = trained([4], 0, schedule, loss_over)
    for balance in compositions(4):
        for keep in (0, 1, 99):
            assert_same(trained(balance, keep, schedule, loss_over), expected, f"{balance}, keep {keep}")


def test_gradients_are_the_unpipelined_models():
    module = language_model(dropout=0.0).double()
    plain = copy.deepcopy(module)
    loss_fn(plain(tokens()), tokens()).backward()
    pipe = make_pipe(module, [1, 2, 1], chunks=1)
    loss_fn(pipe(tokens()), tokens()).backward()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    assert len(list(pipe.parameters())) == len(list(plain.parameters()))
    assert set(pipe.state_dict()) == set(plain.state_dict())


def test_gradients_accumulate_and_graphs_may_be_kept():
    module = language_model(dropout=0.0)
    pipe = make_pipe(module, [2, 2], chunks=1, checkpoint=1)
    loss = loss_fn(pipe(tokens()), tokens())
    loss.backward(retain_graph=True)
    once = gradients(module)
    loss.backward()
    assert_same(gradients(module), {name: g + g for name, g in once.items()})


def test_frozen_and_without_gradients():
    module = language_model(dropout=0.0)
    module[0].weight.requires_grad_(False)
    pipe = make_pipe(module, chunks=2)
    loss_fn(pipe(tokens()), tokens()).backward()
    assert module[0].weight.grad is None
    assert module[3].bias.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(pipe(tokens()), module(tokens()))


def test_an_error_leaves_the_parameters_where_they_were():
    module = language_model()
    module[2] = Apply(lambda x: 1 / 0)
    pipe = make_pipe(module)
    with pytest.raises(ZeroDivisionError):
        pipe(tokens())
    assert module[3].weight is module[0].weight
    assert isinstance(module[3].weight, nn.Parameter)


def test_cells_with_a_module_in_common_and_a_third():
    torch.manual_seed(0)
    shared, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    other.weight = shared.weight
    x = torch.randn(6, 4)
    found = []
    for balance in ([4], [3, 1], [2, 1, 1]):
        module = nn.Sequential(shared, shared, nn.Tanh(), other)
        module.zero_grad()
        make_pipe(module, balance)(x).square().sum().backward()
        found.append(gradients(module))
    for one in found[1:]:
        assert_same(one, found[0])
    with pytest.raises(ValueError, match=r"stage 0 uses one as '0.weight' and stage 1 as '1.weight'.*b.weight = a"):
        GPipe(nn.Sequential(shared, shared, nn.Tanh(), other), [1, 3], devices=["cpu"] * 2)


def test_a_tied_parameter_that_changes_after_forward_is_noticed():
    module = language_model(dropout=0.0)
    pipe = make_pipe(module, [2, 2], checkpoint="always")
    output = pipe(tokens())
    with torch.no_grad():
        module[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place after forward"):
        output.sum().backward()


def exchanged_inside(module, pipe):
    state = {name: value + 1 for name, value in module.state_dict().items()}
    nn.Sequential(pipe).load_state_dict({f"0.{name}": value for name, value in state.items()}, assign=True)


def untied(module, pipe):
    module[2].weight = nn.Parameter(module[0].weight.detach() * 2)


def replaced_by_another(module, pipe):
    module[0].weight = module[2].weight = nn.Parameter(module[0].weight.detach() * 2)


def pruned(module, pipe):
    prune.l1_unstructured(module[2], "weight", 0.5)


def tied_later(module, pipe):
    module[1].weight = module[0].weight


# What was tied when the pipe was made stayed in place: outputs of the old weights, gradients for nobody.
@pytest.mark.parametrize("change", [exchanged_inside, untied, replaced_by_another, pruned, tied_later])
def test_what_is_tied_changes_after_wrapping(change):
    found = []
    for balance in ([1, 1, 1], [3]):
        torch.manual_seed(1)
        module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        module[2].weight = module[0].weight
        pipe = make_pipe(module, balance)
        x = torch.randn(6, 4)
        pipe(x).sum().backward()
        pipe.zero_grad()
        change(module, pipe)
        output = pipe(x)
        output.square().sum().backward()
        torch.testing.assert_close(output, module(x))
        found.append(gradients(module))
        assert all(gradient is not None for gradient in gradients(module).values())
    assert_same(*found)


def test_a_module_shared_by_two_stages_after_wrapping_is_refused_each_time():
    module = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
    pipe = make_pipe(module)
    module[1][0] = module[0][0]
    for _ in range(2):
        with pytest.raises(ValueError, match="every module with parameters, and every buffer, must belong to one"):
            pipe(torch.ones(6, 4))


def test_weights_lent_for_a_call_are_not_kept():
    pipe = make_pipe(nn.Sequential(*(nn.Linear(4, 4) for _ in range(2))))
    lent = {name: p.detach().clone() for name, p in pipe.named_parameters()}
    seen = [weakref.ref(value) for value in lent.values()]
    with torch.no_grad():
        torch.func.functional_call(pipe, lent, (torch.ones(6, 4),))
    del lent
    gc.collect()
    assert not any(ref() is not None for ref in seen)
