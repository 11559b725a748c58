"""ResNets: torchvision's keys, values and outputs to the bit, and its cells under a pipeline."""

import typing

import pytest
import torch
import torchvision
from nets import PlainLoop, make_pipe

from gpipe.models.resnet import Name, ResNet, resnet
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.testing import assert_exact

NAMES = typing.get_args(Name)


def small(block="BasicBlock"):
    """A quarter of the depth of a real one, with its widths: the least that torchvision's class builds."""
    torch.manual_seed(1)
    return ResNet(getattr(torchvision.models.resnet, block), [1, 1, 1, 1], num_classes=5)


def images(rows=3, side=32):
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(2))


# torchvision's


def test_all_of_torchvision_are_there_by_name():
    published = torchvision.models.list_models(torchvision.models, include=["*resnet*", "*resnext*"])
    assert sorted(NAMES) == sorted(published)


@pytest.mark.parametrize("name", NAMES)
def test_keys_shapes_and_counts_are_those_of_torchvision(name):
    with torch.device("meta"):
        model, published = resnet(name), torchvision.models.get_model(name)
    shapes = {key: tuple(value.shape) for key, value in published.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes
    assert list(model.state_dict()) == list(shapes)
    count = sum(p.numel() for p in model.parameters())
    assert count == torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_outputs_are_those_of_torchvision_to_the_bit(name):
    torch.manual_seed(3)
    published = torchvision.models.get_model(name, num_classes=7)
    torch.manual_seed(3)
    model = resnet(name, num_classes=7)
    for key, value in published.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)  # the same start values
    with torch.no_grad():
        assert torch.equal(model(images()), published(images()))  # in training mode
        for key, value in published.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)  # the same running statistics
        assert torch.equal(model.eval()(images()), published.eval()(images()))


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_weights_load_strictly_both_ways(block):
    model = small(block)
    published = torchvision.models.ResNet(getattr(torchvision.models.resnet, block), [1, 1, 1, 1], num_classes=5)
    model.load_state_dict(published.state_dict())
    assert torch.equal(model(images()), published(images()))
    published.load_state_dict(small(block).state_dict())
    assert torch.equal(small(block)(images()), published(images()))


def test_residual_branches_may_start_as_zero():
    with torch.random.fork_rng():
        model = resnet("resnet18", zero_init_residual=True)
    assert not model.layer1[0].bn2.weight.any()


# Cells


def test_cells_are_the_stem_the_blocks_and_the_head():
    kinds = [type(cell).__name__ for cell in small("Bottleneck").cells()]
    assert kinds == ["Stem", *["Bottleneck"] * 4, "Sequential"]
    with torch.device("meta"):
        assert len(resnet("resnet101").cells()) == 1 + 33 + 1


def test_each_parameter_is_in_exactly_one_cell_and_cells_are_not_in_the_state_dict():
    model = small()
    keys = list(model.state_dict())
    held = [id(parameter) for cell in model.cells() for parameter in cell.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}
    model(images())
    assert list(model.state_dict()) == keys


def test_cells_take_the_mode_of_the_model_and_leave_its_layers_alone():
    model = small()
    model.bn1.eval()
    assert all(cell.training for cell in model.cells())
    assert not model.bn1.training
    assert not any(cell.training for cell in model.eval().cells())


def test_every_cell_profiles_and_estimates():
    measured = profile(small(), images(4), chunks=2, repeats=1)
    with torch.device("meta"):
        estimated = estimate(small(), images(4).to("meta"), speed=Speed(1e9, 1e9), chunks=2)
    assert [cost.boundary_bytes for cost in measured] == [cost.boundary_bytes for cost in estimated]
    assert measured[0].boundary_bytes == 4 * 2 * 64 * 8 * 8
    assert sum(cost.parameter_bytes for cost in measured) == 4 * sum(p.numel() for p in small().parameters())


# Under a pipeline


def test_pipelines_train_to_the_same_bits():
    assert_exact(small("Bottleneck"), images(4), stages=(2, 3), chunks=2, checkpoints=("always", "never"), steps=1)


def test_pipelined_gradients_are_those_of_torchvision():
    model = small().double().eval()
    published = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).double()
    published.load_state_dict(model.state_dict())
    published.eval()(images().double()).square().sum().backward()
    expected = dict(published.named_parameters())
    for balance in ([3, 3], [2, 2, 2]):
        pipe = make_pipe(model, balance)
        assert list(pipe.state_dict()) == list(published.state_dict())
        pipe.zero_grad()
        pipe(images().double()).square().sum().backward()
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-9, msg=name)


def test_a_pipe_in_eval_mode_is_the_model():
    model = small()
    found = make_pipe(model, [3, 3]).eval()(images())
    assert torch.equal(found, PlainLoop(model)(images()))
    torch.testing.assert_close(found, model(images()), rtol=1e-4, atol=1e-4)


def test_deferred_batch_norm_leaves_the_statistics_of_the_whole_batch():
    """Of every layer where micro-batches are alike, and of the first one always."""
    model, plain, alike = small(), small(), images(2).repeat(3, 1, 1, 1)
    plain(alike)
    make_pipe(model, [2, 2, 2], deferred_batch_norm=True)(alike)
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
    model, plain = small(), small()
    plain(images(6))
    make_pipe(model, [2, 2, 2], deferred_batch_norm=True)(images(6))
    torch.testing.assert_close(model.bn1.running_var, plain.bn1.running_var)
    torch.testing.assert_close(model.bn1.running_mean, plain.bn1.running_mean)
    assert model.layer4[0].bn2.num_batches_tracked == 1


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet20"}, "name to be one of 'resnet18', .* given 'resnet20'"),
        ({"name": "resnet18", "num_classes": 0}, "num_classes to be a whole number of at least 1, given 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet(**arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (images()[:, :1], r"shape \(B, 3, H, W\), given \(3, 1, 32, 32\); .* number of channels"),
        (images()[0], r"shape \(B, 3, H, W\), given \(3, 32, 32\)"),
        (images()[:, :, :0], "at least 1 pixels a side, given 0 x 32"),
        (images().byte(), r"floating dtype, given torch\.uint8; scale"),
    ],
)
def test_images_the_model_cannot_read_are_refused_by_the_first_cell(x, message):
    for run in (small(), small().cells()[0], make_pipe(small(), [3, 3], chunks=1)):
        with pytest.raises(ValueError, match=f"ResNet images: expected .*{message}"):
            run(x)
