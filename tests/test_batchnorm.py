"""Batch norm: running statistics once per mini-batch where deferred, never twice because of a recompute."""

import pytest
import torch
from nets import Apply, PlainLoop, assert_as_plain, assert_same, make_pipe
from torch import nn

KEEPS = ("always", "except_last", "never")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")

SHAPES = {nn.BatchNorm1d: (5,), nn.BatchNorm2d: (5, 3, 2), nn.BatchNorm3d: (5, 2, 3, 2)}


def running(module):
    return {name: b.clone() for name, b in module.named_buffers() if name.split(".")[-1] in RUNNING}


def train(run, x, steps=3):
    for step in range(steps):
        run(x * (step + 1)).square().mean().backward()


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("momentum", [0.1, 0.9, None])
@pytest.mark.parametrize(("layer", "shape"), SHAPES.items(), ids=lambda x: getattr(x, "__name__", None))
@pytest.mark.parametrize("rows", [12, 11])
def test_deferred_statistics_are_those_of_the_whole_batch(layer, shape, momentum, keep, rows):
    def make():
        return nn.Sequential(nn.Identity(), layer(5, momentum=momentum), nn.Identity()).double()

    x = torch.randn(rows, *shape, dtype=torch.float64) * 3 + 1
    plain = make()
    train(plain, x)
    for balance in ([3], [1, 2]):
        module = make()
        train(make_pipe(module, balance, 5, keep, deferred_batch_norm=True), x)
        torch.testing.assert_close(running(module), running(plain), rtol=1e-12, atol=1e-12)
        assert module[1].num_batches_tracked == 3


def test_channels_in_the_last_but_one_dimension_of_sequences():
    x = torch.randn(7, 5, 6) + 2
    plain, module = nn.Sequential(nn.BatchNorm1d(5)), nn.Sequential(nn.BatchNorm1d(5))
    plain(x)
    make_pipe(module, chunks=3, deferred_batch_norm=True)(x)
    torch.testing.assert_close(running(module), running(plain))


@pytest.mark.parametrize("deferred", [True, False])
def test_the_bits_do_not_depend_on_balance_or_keep(deferred):
    x = torch.randn(11, 4)
    found = {}
    for balance in ([4], [1, 3], [2, 2], [1, 1, 1, 1]):
        for keep in KEEPS:
            torch.manual_seed(1)
            module = nn.Sequential(
                nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=None)
            )
            train(make_pipe(module, balance, 4, keep, deferred_batch_norm=deferred), x)
            found[str(balance), keep] = running(module)
    first = next(iter(found.values()))
    assert first["1.num_batches_tracked"] == (3 if deferred else 12)
    for where, values in found.items():
        assert_same(values, first, where)


def test_not_deferred_is_as_the_plain_loop():
    def make():
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.Tanh())

    assert_as_plain(make, torch.randn(11, 4), chunks=4)


def test_not_deferred_without_gradients():
    module, plain = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(11, 4)
    with torch.no_grad():
        make_pipe(module, checkpoint="always")(x)
        PlainLoop(plain)(x)
    assert_same(running(module), running(plain))


def test_deferred_outputs_are_normalised_by_micro_batch():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(11, 4)
    assert torch.equal(make_pipe(module, deferred_batch_norm=True)(x), PlainLoop(module)(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_deferred_without_gradients(mode):
    module, plain = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(11, 4)
    with mode():
        make_pipe(module, deferred_batch_norm=True)(x)
        plain(x)
    torch.testing.assert_close(running(module), running(plain))


def test_deferred_in_train_step_over_micro_batches():
    module, plain = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(11, 4)
    pipe = make_pipe(module, checkpoint="always", deferred_batch_norm=True)
    pipe.train_step(x, x, nn.functional.mse_loss, "micro_batch")
    plain(x)
    torch.testing.assert_close(running(module), running(plain))


@pytest.mark.parametrize("deferred", [True, False])
def test_eval_uses_and_leaves_the_running_statistics(deferred):
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    pipe = make_pipe(module, checkpoint="always", deferred_batch_norm=deferred)
    x = torch.randn(11, 4)
    pipe(x)
    before = running(module)
    pipe.eval()
    y = pipe(x)
    torch.testing.assert_close(y, module(x))
    y.sum().backward()
    assert_same(running(module), before)


def test_outside_the_pipe_the_module_behaves_as_before():
    module, plain = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(11, 4)
    pipe = make_pipe(module, deferred_batch_norm=True)
    pipe(x).sum().backward()
    plain.load_state_dict(module.state_dict())
    for _ in range(2):
        assert torch.equal(module(x), plain(x))
    assert_same(running(module), running(plain))
    assert list(module.state_dict()) == list(plain.state_dict())


def test_two_pipes_around_one_module():
    module = nn.Sequential(nn.BatchNorm1d(4))
    x = torch.randn(12, 4)
    deferring, plain = make_pipe(module, chunks=4, deferred_batch_norm=True), make_pipe(module, chunks=4)
    make_pipe(module, chunks=4, deferred_batch_norm=True)
    deferring(x)
    assert module[0].num_batches_tracked == 1
    plain(x)
    assert module[0].num_batches_tracked == 5


def test_layers_that_track_nothing_or_scale_nothing():
    x = torch.randn(11, 4)

    def make():
        return nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4, affine=False))

    plain, module = make(), make()
    plain[1](PlainLoop(plain[:1])(x))
    make_pipe(module, deferred_batch_norm=True)(x)
    torch.testing.assert_close(running(module), running(plain))


# The second use of a layer overwrote what the first had collected.
def test_a_layer_used_twice_is_updated_twice():
    def make():
        return nn.Sequential(Apply(lambda x, norm: norm(norm(x) * 2 + 1), nn.BatchNorm1d(4)))

    x = torch.randn(12, 4)
    plain, module = make(), make()
    plain(x)
    make_pipe(module, chunks=1, deferred_batch_norm=True)(x)
    torch.testing.assert_close(running(module), running(plain))
    module = make()
    make_pipe(module, chunks=3, deferred_batch_norm=True)(x)
    assert module[0].parts[0].num_batches_tracked == 2


# The hook looked for the input among the positional arguments only.
def test_a_layer_called_by_keyword():
    def make():
        return nn.Sequential(Apply(lambda x, norm: norm(input=x), nn.BatchNorm1d(4)))

    x = torch.randn(12, 4)
    plain, module = make(), make()
    plain(x)
    make_pipe(module, deferred_batch_norm=True)(x)
    torch.testing.assert_close(running(module), running(plain))


def test_low_precision_inputs_are_summed_in_float32():
    x = (torch.randn(4096, 2) + 100).bfloat16()
    plain, module = nn.Sequential(nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2))
    plain(x.float())
    make_pipe(module, chunks=7, deferred_batch_norm=True)(x)
    torch.testing.assert_close(running(module), running(plain))


def test_a_failing_forward_commits_nothing():
    def fail(x):
        raise ValueError("boom")

    module = nn.Sequential(nn.BatchNorm1d(4), Apply(fail))
    before = running(module)
    with pytest.raises(ValueError, match="boom"):
        make_pipe(module, deferred_batch_norm=True)(torch.randn(12, 4))
    assert_same(running(module), before)
    module[0](torch.randn(12, 4))
    assert module[0].num_batches_tracked == 1


# What one mini-batch committed looked like a buffer changed between another's forward and its recompute.
def test_two_mini_batches_in_flight():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())
    pipe = make_pipe(module, checkpoint="always", deferred_batch_norm=True)
    first, second = (pipe(x).square().sum() for x in torch.randn(2, 12, 4))
    first.backward()
    second.backward()
    assert module[1].num_batches_tracked == 2
