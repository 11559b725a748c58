"""AmoebaNet-D: counts, the two cells against a restatement, its cells under a pipeline, and what is refused."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from nets import PlainLoop, make_pipe
from torch import nn

from gpipe.models.amoebanet import Cell, amoebanet_d
from gpipe.models.amoebanet_genotype import NORMAL, REDUCTION
from gpipe.models.amoebanet_operations import DropPath, FactorizedReduce, operation
from gpipe.models.classification import ClassificationLoss
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.testing import assert_exact

# (L, D) and the number of parameters with 1000 classes and no auxiliary head: of GPipe's experiments, to the last one
PUBLISHED = {
    (18, 208): 81505540,
    (18, 256): 122470120,
    (18, 416): 319024120,
    (18, 544): 542734840,
    (36, 544): 1055832376,
    (72, 512): 1844858344,
}


def tiny(**settings):
    torch.manual_seed(1)
    return amoebanet_d(**{"layers": 3, "filters": 8, "num_classes": 4, "in_channels": 1, "stem": "small"} | settings)


def images(rows=6, side=7, channels=1):
    return torch.randn(rows, channels, side, side, generator=torch.Generator().manual_seed(2))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# Sizes


@pytest.mark.parametrize("size", PUBLISHED, ids=str)
def test_parameters_of_the_experiments(size):
    with torch.device("meta"):
        model = amoebanet_d(*size)
    assert parameters(model) == PUBLISHED[size]
    assert len(model) == size[0] + 6


@pytest.mark.parametrize("side", [224, 331, 17])
def test_the_shapes_of_images_in_the_papers(side):
    shapes = {}
    with torch.device("meta"):
        model, x = amoebanet_d(6, 16), torch.empty(2, 3, side, side)
        for name, cell in model.named_children():
            x = cell(x)
            shapes[name] = tuple(x[0].shape) if isinstance(x, tuple) else tuple(x.shape)

    def expected(channels, halvings):
        return 2, channels, math.ceil(side / 2**halvings), math.ceil(side / 2**halvings)

    assert shapes == {
        "stem1": expected(4, 1),
        "stem2": expected(3 * 8, 2),
        "stem3": expected(3 * 16, 3),
        "cell1_normal1": expected(4 * 16, 3),
        "cell1_normal2": expected(4 * 16, 3),
        "cell2_reduction": expected(3 * 32, 4),
        "cell3_normal1": expected(4 * 32, 4),
        "cell3_normal2": expected(4 * 32, 4),
        "cell4_reduction": expected(3 * 64, 5),
        "cell5_normal1": expected(4 * 64, 5),
        "cell5_normal2": expected(4 * 64, 5),
        "classify": (2, 1000),
    }


def test_the_small_stem_keeps_the_size_and_has_no_reductions():
    model = tiny()
    names = [
        "stem",
        "cell1_normal1",
        "cell2_reduction",
        "cell3_normal1",
        "cell4_reduction",
        "cell5_normal1",
        "classify",
    ]
    assert [name for name, _ in model.named_children()] == names
    assert model.stem(images())[0].shape == (6, 8, 7, 7)
    assert model(images()).shape == (6, 4)
    assert model(images(side=3)).shape == (6, 4)  # 3, 2, 1


def test_convolutions_start_with_the_variance_of_their_outputs():
    weight = tiny(filters=64).cell5_normal1.operations[0][1].weight  # 256 to 256 channels, 1 x 1
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.02)


# The cells, against a plain restatement


def relu_conv_norm(part, x, stride=(1, 1)):
    weight, norm = part[1].weight, part[2]
    height, width = weight.shape[2:]
    y = F.conv2d(F.relu(x), weight, None, stride, (height // 2, width // 2))
    return F.batch_norm(y, None, None, norm.weight, norm.bias, training=True)


def bottleneck(parts, x, strides):
    for part, stride in zip(parts, strides, strict=True):
        x = relu_conv_norm(part, x, stride)
    return x


def halved(part, x):
    x = F.relu(x)
    odd = F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
    y = torch.cat([F.conv2d(x, part.even.weight, stride=2), F.conv2d(odd, part.odd.weight, stride=2)], 1)
    return F.batch_norm(y, None, None, part.norm.weight, part.norm.bias, training=True)


def average(x):
    ones = torch.ones_like(x)
    return F.avg_pool2d(x, 3, 1, 1, divisor_override=1) / F.avg_pool2d(ones, 3, 1, 1, divisor_override=1)


def made(genotype, **settings):
    torch.manual_seed(3)
    sizes = {"current": 6, "before": 5, "channels": 8, "halve_before": False, "drop_path": 0.0}
    cell = Cell(genotype, **sizes | settings).double()
    for parameter in cell.parameters():  # norms start as ones and zeros
        nn.init.normal_(parameter)
    return cell


def test_the_normal_cell():
    cell = made(NORMAL, halve_before=True)
    current, before = torch.randn(3, 6, 5, 5).double(), torch.randn(3, 5, 9, 9).double()
    op, one = cell.operations, (1, 1)
    s0, s1 = relu_conv_norm(cell.squeeze, current), halved(cell.match, before)
    s2 = relu_conv_norm(op[0], s1) + F.max_pool2d(s1, 3, 1, 1)
    s3 = s1 + bottleneck(op[3], s0, [one] * 4)
    s4 = relu_conv_norm(op[4], s0) + bottleneck(op[5], s0, [one] * 4)
    s5 = F.max_pool2d(s2, 3, 1, 1) + s2
    s6 = average(s1) + relu_conv_norm(op[9], s5)
    output, passed, auxiliary = cell((current, before, None))
    torch.testing.assert_close(output, torch.cat([s0, s3, s4, s6], dim=1))
    assert passed is current
    assert auxiliary is None
    assert [tuple(part[1].weight.shape[2:]) for part in op[3]] == [(1, 1), (1, 7), (7, 1), (1, 1)]


@pytest.mark.parametrize("side", [6, 5])
def test_the_reduction_cell(side):
    cell = made(REDUCTION)
    current, before = torch.randn(3, 6, side, side).double(), torch.randn(3, 5, side, side).double()
    op, one, two = cell.operations, (1, 1), (2, 2)
    s0, s1 = relu_conv_norm(cell.squeeze, current), relu_conv_norm(cell.match, before)
    s2 = F.max_pool2d(s0, 2, 2, ceil_mode=True) + F.max_pool2d(s0, 3, 2, 1)
    s3 = s2 + bottleneck(op[3], s1, [one, two, one])
    s4 = bottleneck(op[4], s2, [one] * 4) + F.max_pool2d(s2, 3, 1, 1)
    s5 = s3 + F.max_pool2d(s1, 2, 2, ceil_mode=True)
    s6 = average(s2) + relu_conv_norm(op[9], s3)
    output, passed, _ = cell((current, before, None))
    torch.testing.assert_close(output, torch.cat([s4, s5, s6], dim=1))
    assert output.shape == (3, 24, 3, 3)
    assert passed is current
    assert [tuple(part[1].weight.shape[2:]) for part in op[3]] == [(1, 1), (3, 3), (1, 1)]


def test_the_first_cell_reads_the_stem_twice():
    cell = made(NORMAL, before=6)
    x = torch.randn(3, 6, 5, 5).double()
    assert torch.equal(cell((x, None, None))[0], cell((x, x, None))[0])


def test_max_pools_take_the_maximum_and_keep_the_edge():
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, -5.0], [-7.0, -8.0, -6.0]])[None, None]
    assert operation("max_pool_2x2", 1, 2)(x).flatten().tolist() == [4.0, 9.0, -7.0, -6.0]
    assert operation("max_pool_3x3", 1, 2)(x).flatten().tolist() == [4.0, 9.0, 4.0, 4.0]
    assert operation("avg_pool_3x3", 1, 1)(x)[0, 0, 0, 0] == 2.5  # of four pixels: the padding does not count


@pytest.mark.parametrize("side", [4, 5])
def test_factorized_reduction_reads_even_and_odd_pixels(side):
    reduce = FactorizedReduce(1, 2).eval()
    nn.init.ones_(reduce.even.weight)
    nn.init.ones_(reduce.odd.weight)
    x = torch.arange(1.0, side * side + 1).view(1, 1, side, side)
    even, odd = reduce(x)[0] * math.sqrt(1 + 1e-5)
    torch.testing.assert_close(even, x[0, 0, ::2, ::2])
    torch.testing.assert_close(odd, F.pad(x, (0, 1, 0, 1))[0, 0, 1::2, 1::2])


# Drop-path and the auxiliary head


def test_drop_path_drops_rows_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3, 3, dtype=torch.bfloat16)
    drop = DropPath(0.25)
    y = drop(x)
    rows = y.float().amax(dim=(1, 2, 3))
    assert y.dtype == x.dtype
    assert torch.equal(y, y[:, :1, :1, :1].expand_as(y))
    assert set(rows.tolist()) == {0.0, torch.tensor(4 / 3).bfloat16().item()}
    assert (rows == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert drop.eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_drop_path_spares_what_does_nothing():
    """Where everything else is dropped, state 3 is the input before, which "none" hands on."""
    cell = made(NORMAL, before=6)
    cell.drop_path.probability = 1 - 1e-12
    x = torch.randn(3, 6, 5, 5).double()
    s0, s3, s4, s6 = cell((x, x, None))[0].chunk(4, dim=1)
    assert torch.equal(s0, relu_conv_norm(cell.squeeze, x))
    assert torch.equal(s3, relu_conv_norm(cell.match, x))
    assert not s4.any()
    assert not s6.any()


def test_drop_path_is_part_of_no_state_and_off_in_eval_mode():
    plain, dropping = tiny(), tiny(drop_path=0.9, dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    assert not torch.allclose(dropping(images()), plain(images()))
    dropping.load_state_dict(plain.state_dict())
    assert torch.equal(dropping.eval()(images()), plain.eval()(images()))


@pytest.mark.parametrize(("stem", "side", "kernel"), [("small", 9, 1), ("small", 16, 2), ("imagenet", 224, 4)])
def test_the_auxiliary_head_classifies_after_the_second_group_in_training(stem, side, kernel):
    with torch.device("meta"):
        model = tiny(stem=stem, aux_head=True, image_size=side)
        logits, auxiliary = model(torch.empty(2, 1, side, side))
        alone = model.eval()(torch.empty(2, 1, side, side))
    names = [name for name, _ in model.named_children()]
    assert names.index("auxiliary") == names.index("cell4_reduction") - 1 == names.index("cell3_normal1") + 1
    assert logits.shape == auxiliary.shape == alone.shape == (2, 4)
    widths = [tuple(p.shape) for p in model.auxiliary.parameters() if p.dim() > 1]
    assert widths == [(51, 64, 1, 1), (307, 51, kernel, kernel), (4, 307)]


def test_the_auxiliary_head_leaves_the_rest_as_it_is():
    model, plain = tiny(aux_head=True, image_size=9), tiny()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert {key.split(".")[0] for key in unexpected} == {"auxiliary"}
    assert torch.equal(model(images(side=9))[0], plain(images(side=9)))


def test_the_loss_adds_a_share_of_the_auxiliary_one():
    logits, auxiliary, targets = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    one, other = F.cross_entropy(logits, targets), F.cross_entropy(auxiliary, targets)
    assert torch.equal(ClassificationLoss()(logits, targets), one)
    torch.testing.assert_close(ClassificationLoss()((logits, auxiliary), targets), one + 0.4 * other)
    torch.testing.assert_close(ClassificationLoss(2.0)((logits, auxiliary), targets), one + 2 * other)
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.1)
    assert torch.equal(ClassificationLoss(label_smoothing=0.1)(logits, targets), smoothed)
    with pytest.raises(ValueError, match=r"auxiliary_weight to be at least 0, given -1; set it to 0\.0"):
        ClassificationLoss(-1)
    with pytest.raises(ValueError, match=r"label_smoothing .* given 1\.5"):
        ClassificationLoss(label_smoothing=1.5)


# Cells


def test_the_boundaries_are_the_two_latest_outputs():
    x = images()
    before = None
    for name, cell in tiny().named_children():
        previous, x = x, cell(x)
        if name != "classify":
            current, passed, auxiliary = x
            assert passed is before
            assert auxiliary is None
            before = current
        else:
            assert x.shape == (6, 4)
            assert previous[0] is before


@pytest.mark.parametrize("settings", [{}, {"aux_head": True, "image_size": 9}], ids=["plain", "auxiliary"])
def test_every_cell_profiles_and_estimates(settings):
    model = tiny(**settings)
    measured = profile(model, images(side=9), chunks=2, repeats=1)
    estimated = estimate(tiny(**settings), images(side=9).to("meta"), speed=Speed(1e9, 1e9), chunks=2)
    assert [cost.name for cost in measured] == [name for name, _ in model.named_children()]
    assert sum(cost.parameter_bytes for cost in measured) == 4 * parameters(model)
    assert [cost.boundary_bytes for cost in measured] == [cost.boundary_bytes for cost in estimated]
    assert measured[1].boundary_bytes == 4 * 3 * 9 * 9 * (8 + 4 * 8)  # three rows; the stem's output goes along


@pytest.mark.parametrize("settings", [{}, {"aux_head": True, "image_size": 9}], ids=["plain", "auxiliary"])
def test_pipelines_train_to_the_same_bits_with_drop_path(settings):
    model = tiny(drop_path=0.3, dropout=0.2, **settings)
    assert_exact(model, images(side=9), stages=(2, 3), chunks=3, steps=1)


def test_pipelined_gradients_are_those_of_the_model():
    model, targets = tiny().double().eval(), torch.tensor([0, 1, 2, 3, 0, 1])
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(images().double()), targets).backward()
    for balance in ([3, 4], [2, 2, 3]):
        model.zero_grad()
        F.cross_entropy(make_pipe(model, balance)(images().double()), targets).backward()
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("schedule", ["one_f_one_b", "zero_bubble_h1"])
def test_other_schedules_give_the_same_gradients(schedule):
    model, targets, loss_fn = tiny(drop_path=0.3), torch.tensor([0, 1, 2, 3, 0, 1]), ClassificationLoss()
    plain = PlainLoop(copy.deepcopy(model))
    pipe = make_pipe(model, [2, 2, 3])
    pipe.train_step(images(), targets, loss_fn, "micro_batch", schedule=schedule)
    loss_fn(plain(images()), targets).backward()
    for (name, parameter), other in zip(model.named_parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)


def test_a_pipe_in_eval_mode_is_the_model():
    model = tiny()
    assert torch.equal(make_pipe(model, [3, 4]).eval()(images()), PlainLoop(model)(images()))
    torch.testing.assert_close(PlainLoop(model)(images()), model(images()))


def test_deferred_batch_norm_leaves_the_statistics_of_the_whole_batch():
    """Of every layer where micro-batches are alike, and of the first one always."""
    model, plain, alike = tiny(), tiny(), images(2).repeat(3, 1, 1, 1)
    plain(alike)
    make_pipe(model, [2, 2, 3], deferred_batch_norm=True)(alike)
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    model, plain = tiny(), tiny()
    plain(images())
    make_pipe(model, [2, 2, 3], deferred_batch_norm=True)(images())
    torch.testing.assert_close(dict(model.stem.norm.named_buffers()), dict(plain.stem.norm.named_buffers()))
    assert model.cell5_normal1.match.norm.num_batches_tracked == 1


def test_a_few_steps_lower_the_loss():
    model, loss_fn = tiny(aux_head=True, image_size=9), ClassificationLoss()
    pipe = make_pipe(model, [4, 4], chunks=2)
    optimizer = torch.optim.AdamW(pipe.parameters(), 0.01)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        values.append(pipe.train_step(images(8, 9), torch.arange(8) % 4, loss_fn).item())
        optimizer.step()
    assert values[-1] < values[0] / 4
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 4}, "layers to be a multiple of 3, .* three groups, given 4; set layers to 3 or 6"),
        ({"layers": 2}, "layers to be a multiple of 3, .* given 2; set layers to 3$"),
        ({"layers": 0}, "layers to be a whole number of at least 1, given 0"),
        ({"filters": 12}, "filters to be a multiple of 8, .* given 12; set filters to 8 or 16"),
        ({"filters": "8"}, "filters to be a whole number of at least 1, given '8'"),
        ({"num_classes": 0}, "num_classes .* given 0"),
        ({"in_channels": -1}, "in_channels .* given -1"),
        ({"stem": "cifar"}, "stem to be one of 'imagenet', 'small', given 'cifar'"),
        ({"drop_path": -0.1}, r"drop_path to be a number of at least 0 and below 1, given -0\.1"),
        ({"drop_path": 1.0}, r"drop_path .* given 1\.0"),
        ({"dropout": "0"}, "dropout .* given '0'"),
        (
            {"aux_head": True, "image_size": 8},
            "image_size to be at least 9 with aux_head=True and stem='small', .* given 8; .* set aux_head=False",
        ),
        ({"aux_head": True, "image_size": 64, "stem": "imagenet"}, "image_size to be at least 65 .* given 64"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_images_the_model_cannot_read_are_refused_by_the_first_cell():
    model = tiny()
    cases = {
        r"shape \(B, 1, H, W\), given \(6, 3, 7, 7\); .* number of channels": images(channels=3),
        r"shape \(B, 1, H, W\), given \(1, 7, 7\)": images()[0],
        r"at least 3 pixels a side, given 2 x 2; enlarge": images(side=2),
        r"floating dtype, given torch\.uint8; scale": images().byte(),
    }
    for message, x in cases.items():
        with pytest.raises(ValueError, match=f"AmoebaNet-D images: expected .*{message}"):
            make_pipe(model, [3, 4], chunks=1)(x)
    with pytest.raises(ValueError, match=r"at least 17 pixels a side, given 16 x 16; .* stem='small', which takes 3"):
        tiny(stem="imagenet")(images(side=16))
    with pytest.raises(ValueError, match=r"expected 9 x 9 pixels, .* given 10 x 10; .* with their image_size"):
        tiny(aux_head=True, image_size=9)(images(side=10))


def test_one_row_for_the_auxiliary_head_is_refused():
    model = tiny(aux_head=True, image_size=9)
    with pytest.raises(ValueError, match=r"at least 2 rows in training, .* given 1; .* fewer chunks"):
        make_pipe(model, [4, 4])(images(3, 9))
    assert model.eval()(images(1, 9)).shape == (1, 4)


def test_images_are_brought_to_the_precision_of_the_parameters():
    assert tiny().bfloat16()(images()).dtype == torch.bfloat16
