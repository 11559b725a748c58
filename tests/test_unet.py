"""U-Net: counts by formula, a plain functional restatement, its skips under a pipeline, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import PlainLoop, make_pipe
from torch import nn

from gpipe.models.unet import Convolution, unet
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.partitioning.skips import skips_of
from gpipe.skip import verify_skippables
from gpipe.testing import assert_exact

# U-Net (B, C) of torchgpipe's memory benchmark, and its parameters as printed there
PUBLISHED = {
    (6, 72): "362.2M",
    (11, 128): "2.21B",
    (24, 128): "4.99B",
    (24, 160): "7.80B",
    (48, 160): "15.82B",
}


def tiny(**settings):
    torch.manual_seed(1)
    return unet(**{"depth": 2, "num_convs": 2, "base_channels": 4, "out_channels": 2} | settings)


def images(rows=4, height=8, width=8):
    return torch.randn(rows, 3, height, width, generator=torch.Generator().manual_seed(2))


# Sizes


def count(depth, convs, channels, inputs, outputs):
    """Weights of 3 x 3 convolutions in, inside and out of every level, and of the last 1 x 1 convolution."""

    def level(first, inside, last):
        return 9 * (first * inside + (convs - 2) * inside**2 + inside * last if convs > 1 else first * last)

    total = level(channels * 2 ** (depth - 1), channels * 2**depth, channels * 2 ** (depth - 1))
    for i in range(depth):
        wide = channels * 2**i
        total += level(wide // 2 if i else inputs, wide, wide) + level(2 * wide, wide // 2, wide // 2)
    return total + channels // 2 * outputs


@pytest.mark.parametrize("size", PUBLISHED, ids=str)
def test_parameters_of_the_benchmark(size):
    with torch.device("meta"):
        model = unet(num_convs=size[0], base_channels=size[1])
    found = sum(p.numel() for p in model.parameters())
    assert found == count(5, *size, 3, 1)
    assert PUBLISHED[size] == (f"{found / 1e9:.2f}B" if found > 1e9 else f"{found / 1e6:.1f}M")


@pytest.mark.parametrize("convs", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 3])
def test_parameters_by_formula(depth, convs):
    model = tiny(depth=depth, num_convs=convs, base_channels=6, in_channels=2, out_channels=5)
    assert sum(p.numel() for p in model.parameters()) == count(depth, convs, 6, 2, 5)
    assert len(model) == (2 * depth + 1) * convs + 2 * depth + 1


# Against a plain restatement


def restated(model, x, depth, convs):
    """One function, without cells and skips; in eval mode."""

    def level(name, x):
        for i in range(1, convs + 1):
            x = F.conv2d(x, weights[f"{name}_conv{i}.conv.weight"], padding=1)
            x = F.leaky_relu(F.instance_norm(x), 0.01)
        return x

    weights, kept = model.state_dict(), []
    for i in range(1, depth + 1):
        kept.append(level(f"encoder{i}", x))
        x = F.max_pool2d(kept[-1], 2)
    x = level("bottleneck", x)
    for i in range(depth, 0, -1):
        features = kept.pop()
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        padded = x.new_zeros(*x.shape[:2], *features.shape[2:])
        padded[:, :, : x.shape[2], : x.shape[3]] = x
        x = level(f"decoder{i}", torch.cat([padded, features], 1))
    return F.conv2d(x, weights["segment.weight"])


@pytest.mark.parametrize(("depth", "convs"), [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("side", [(16, 16), (19, 21), (17, 8)])
def test_outputs_are_those_of_one_plain_function_to_the_bit(depth, convs, side):
    model = tiny(depth=depth, num_convs=convs).eval()
    x = images(2, *side)
    y = model(x)
    assert y.shape == (2, 2, *side)
    assert torch.equal(y, restated(model, x, depth, convs))


def test_dropout_drops_whole_channels_in_training_only():
    model = Convolution(3, 200, 0.25)
    x = images(2)
    empty = (model(x) == 0).flatten(2).all(-1)  # dropped channels stay zero under instance normalisation
    assert empty.double().mean().item() == pytest.approx(0.25, abs=0.08)
    assert not (model.eval()(x) == 0).flatten(2).all(-1).any()


def test_convolutions_have_the_slope_of_the_benchmark():
    model = Convolution(3, 5, 0.0)
    plain = nn.Sequential(model.conv, nn.InstanceNorm2d(5), nn.LeakyReLU(1e-2))
    assert torch.equal(model(images()), plain(images()))


# Cells and skips


def test_the_cells_and_their_skips():
    model = tiny()
    names = [name for name, _ in model.named_children()]
    assert names == [
        *("encoder1_conv1", "encoder1_conv2", "encoder1_down", "encoder2_conv1", "encoder2_conv2", "encoder2_down"),
        *("bottleneck_conv1", "bottleneck_conv2"),
        *("decoder2_up", "decoder2_conv1", "decoder2_conv2", "decoder1_up", "decoder1_conv1", "decoder1_conv2"),
        "segment",
    ]
    verify_skippables(model)
    ways = [(names[skip.source], names[skip.target]) for skip in skips_of(list(model.named_children()))]
    assert ways == [("encoder2_down", "decoder2_up"), ("encoder1_down", "decoder1_up")]


def test_two_models_do_not_share_their_skips():
    nn.Sequential(tiny(), nn.Conv2d(2, 3, 1), tiny())(images())
    verify_skippables(nn.Sequential(*tiny(), nn.Conv2d(2, 3, 1), *tiny()))


def test_every_cell_profiles_and_estimates():
    measured = profile(tiny(), images(), chunks=2, repeats=1)
    estimated = estimate(tiny(), images().to("meta"), speed=Speed(1e9, 1e9), chunks=2)
    assert [cost.boundary_bytes for cost in measured] == [cost.boundary_bytes for cost in estimated]
    sizes = {cost.name: cost.boundary_bytes for cost in measured}
    assert sizes["encoder1_conv1"] == 4 * 2 * 4 * 8 * 8
    assert sizes["encoder1_down"] == 4 * 2 * 4 * 4 * 4
    assert sizes["decoder1_up"] == 4 * 2 * 8 * 8 * 8
    assert sum(cost.parameter_bytes for cost in measured) == 4 * count(2, 2, 4, 3, 2)


# Under a pipeline


def test_pipelines_train_to_the_same_bits_with_dropout():
    assert_exact(tiny(), images(), stages=(1, 2, 3), chunks=2, steps=2)


def test_pipelined_gradients_are_those_of_the_model():
    model = tiny(dropout=0.0).double()
    plain = copy.deepcopy(model)
    plain(images().double()).square().sum().backward()
    for balance in ([7, 8], [3, 6, 6], [1, 2, 3, 4, 5]):
        model.zero_grad()
        make_pipe(model, balance, chunks=2)(images().double()).square().sum().backward()
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_a_pipe_in_eval_mode_is_the_model():
    model = tiny()
    found = make_pipe(model, [7, 8], chunks=2).eval()(images())
    assert torch.equal(found, PlainLoop(model, 2)(images()))
    torch.testing.assert_close(found, model(images()))


@pytest.mark.parametrize("schedule", ["one_f_one_b", "zero_bubble_h1"])
def test_other_schedules_give_the_same_gradients(schedule):
    model, targets = tiny(), images()[:, :2]
    plain = PlainLoop(copy.deepcopy(model), 2)
    F.mse_loss(plain(images()), targets).backward()
    make_pipe(model, [5, 5, 5], chunks=2).train_step(images(), targets, F.mse_loss, "micro_batch", schedule=schedule)
    for (name, parameter), other in zip(model.named_parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth to be a whole number of at least 1, given 0"),
        ({"num_convs": 1.0}, r"num_convs .* given 1\.0"),
        ({"base_channels": -2}, "base_channels .* given -2"),
        ({"base_channels": 7}, "base_channels to be even, .* given 7; set base_channels to 8"),
        ({"in_channels": 0}, "in_channels .* given 0"),
        ({"out_channels": "1"}, "out_channels .* given '1'"),
        ({"dropout": 1}, "dropout to be a number of at least 0 and below 1, given 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images()[:, :1], r"shape \(B, 3, H, W\), given \(4, 1, 8, 8\); .* number of channels"),
        (images()[0], r"shape \(B, 3, H, W\), given \(3, 8, 8\)"),
        (images(4, 3, 8), "at least 4 pixels a side, given 3 x 8; enlarge .* smaller depth than 2"),
        (images(4, 7, 4), "at least one side of 8 pixels, .* given 7 x 4; enlarge .* smaller depth than 2"),
        (images().byte(), r"floating dtype, given torch\.uint8; scale"),
    ],
)
def test_images_the_model_cannot_read_are_refused_by_the_first_cell(x, message):
    for run in (tiny(), tiny()[0], make_pipe(tiny(), [7, 8], chunks=1)):
        with pytest.raises(ValueError, match=f"U-Net images: expected .*{message}"):
            run(x)


def test_the_smallest_images():
    assert tiny()(images(4, 4, 8)).shape == (4, 2, 4, 8)
