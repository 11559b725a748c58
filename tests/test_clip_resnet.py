"""CLIP's nine published sizes, and its modified ResNets: counts, keys, start values, computation, cells, pipelines."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import PlainLoop, make_pipe
from test_clip import SMALL, spread
from tiny_run import run, write
from torch import nn

from gpipe.models.clip import CLIP, clip
from gpipe.models.clip_resnet import Bottleneck
from gpipe.models.contrastive import ContrastiveLoss
from gpipe.partitioning.estimate import Speed, estimate
from gpipe.partitioning.profile import profile
from gpipe.testing import assert_exact
from gpipe.training.errors import ConfigurationError

# Parameters and keys in the state dict, logit_scale among both.
PUBLISHED = {
    "RN50": (102007137, 489),
    "RN101": (119688033, None),
    "RN50x4": (178300601, None),
    "RN50x16": (290979217, None),
    "RN50x64": (623258305, None),
    "ViT-B/32": (151277313, 302),
    "ViT-B/16": (149620737, 302),
    "ViT-L/14": (427616513, 446),
    "ViT-L/14@336px": (427944193, 446),
}

TEXT = {key: SMALL[key] for key in SMALL if key.startswith("text_") or key in ("context_length", "vocabulary_size")}
TINY = TEXT | {
    "image_size": 64,
    "vision_width": 4,
    "vision_layers": (1, 2, 1, 1),
    "vision_heads": 4,
    "embed_dim": 10,
    "activation": "quick_gelu",
}


def tiny(loud: bool = True, **settings: object) -> CLIP:
    torch.manual_seed(1)
    model = clip(**TINY | settings)
    if loud:  # published start values turn each block's branch off
        for module in model.modules():
            if isinstance(module, Bottleneck):
                nn.init.uniform_(module.bn3.weight, 0.5, 1)
    return model


def batch(rows: int = 6, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(rows, 3, 64, 64, generator=generator, dtype=dtype)
    return images, torch.randint(20, (rows, 7), generator=generator), torch.arange(rows) % 5 + 2


def loss_of(features):
    return ContrastiveLoss().to(features[0].dtype)(features)


# Published counts, names and start values


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    parameters, keys = PUBLISHED[name]
    with torch.device("meta"):
        model, loss = clip(name), ContrastiveLoss()
    assert sum(p.numel() for module in (model, loss) for p in module.parameters()) == parameters
    assert keys is None or len(model.state_dict() | loss.state_dict()) == keys
    assert model.activation == "quick_gelu"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_published_sizes_read(name):
    side = {"RN50x4": 288, "RN50x16": 384, "RN50x64": 448, "ViT-L/14@336px": 336}.get(name, 224)
    with torch.device("meta"):
        model = clip(name).eval()
        image, text = model((torch.empty(2, 3, side, side), torch.empty(2, 77).long(), torch.empty(2).long()))
    width = {"RN50": 1024, "RN50x4": 640, "RN50x16": 768, "RN50x64": 1024}.get(name, 768 if "L" in name else 512)
    assert image.shape == text.shape == (2, width)


def test_sizes_beside_a_name_take_the_place_of_the_published_ones():
    with torch.device("meta"):
        larger = clip("ViT-L/14", image_size=336).state_dict()
        assert {k: v.shape for k, v in larger.items()} == {
            k: v.shape for k, v in clip("ViT-L/14@336px").state_dict().items()
        }
        assert clip("RN50", activation="gelu", context_length=8).activation == "gelu"


def test_resnet_keys_and_shapes():
    block = {"conv1.weight", "conv2.weight", "conv3.weight"}
    norm = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    block |= {f"bn{n}.{part}" for n in (1, 2, 3) for part in norm}
    shortcut = {"downsample.0.weight"} | {f"downsample.1.{part}" for part in norm}
    expected = {f"visual.{key}" for key in block}  # the stem has the same
    for layer, blocks in enumerate((1, 2, 1, 1), start=1):
        for number in range(blocks):
            expected |= {f"visual.layer{layer}.{number}.{key}" for key in (block | shortcut if number == 0 else block)}
    expected |= {f"visual.attnpool.{at}_proj.{kind}" for at in "kqvc" for kind in ("weight", "bias")}
    expected |= {"visual.attnpool.positional_embedding"}
    state = tiny().state_dict()
    assert {key for key in state if key.startswith("visual.")} == expected
    shapes = {key.removeprefix("visual."): tuple(state[key].shape) for key in expected}
    assert shapes["attnpool.positional_embedding"] == (2 * 2 + 1, 128)
    assert shapes["attnpool.c_proj.weight"] == (10, 128)
    assert shapes["conv1.weight"] == (2, 3, 3, 3)
    assert shapes["conv3.weight"] == (4, 2, 3, 3)
    assert shapes["layer4.0.conv3.weight"] == (128, 32, 1, 1)
    assert shapes["layer4.0.downsample.0.weight"] == (128, 64, 1, 1)


def test_resnet_start_values_are_the_published_ones():
    visual = tiny(loud=False, vision_width=8).visual
    for at in "qkvc":
        spread(getattr(visual.attnpool, f"{at}_proj").weight, 256**-0.5)
    spread(visual.attnpool.positional_embedding, 256**-0.5)
    for name, parameter in visual.named_parameters():
        if name.startswith("layer") and name.endswith("bn3.weight"):
            assert not parameter.any()
        elif "bn" in name and name.endswith("weight"):
            assert (parameter == 1).all()  # the stem's third too
    assert 0.9 * (8 / 2 * 9) ** -0.5 < visual.conv2.weight.abs().max() <= (8 / 2 * 9) ** -0.5  # torch's default


# The architecture, against a plain restatement


def naive_norm(x: torch.Tensor, state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def halved(x: torch.Tensor) -> torch.Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def naive_resnet(state: dict[str, torch.Tensor], images: torch.Tensor, layers, heads: int) -> torch.Tensor:
    x = images
    for n, stride in ((1, 2), (2, 1), (3, 1)):
        x = naive_norm(F.conv2d(x, state[f"conv{n}.weight"], stride=stride, padding=1), state, f"bn{n}").clamp(min=0)
    x = halved(x)
    for layer, blocks in enumerate(layers, start=1):
        for number in range(blocks):
            at = f"layer{layer}.{number}"
            pool = halved if layer > 1 and number == 0 else (lambda x: x)
            y = torch.einsum("oi,bihw->bohw", state[f"{at}.conv1.weight"][:, :, 0, 0], x)
            y = naive_norm(y, state, f"{at}.bn1").clamp(min=0)
            y = naive_norm(F.conv2d(y, state[f"{at}.conv2.weight"], padding=1), state, f"{at}.bn2").clamp(min=0)
            y = torch.einsum("oi,bihw->bohw", state[f"{at}.conv3.weight"][:, :, 0, 0], pool(y))
            y = naive_norm(y, state, f"{at}.bn3")
            if number == 0:
                x = torch.einsum("oi,bihw->bohw", state[f"{at}.downsample.0.weight"][:, :, 0, 0], pool(x))
                x = naive_norm(x, state, f"{at}.downsample.1")
            x = (x + y).clamp(min=0)
    pixels = torch.stack([x.mean((2, 3)), *x.flatten(2).unbind(2)])  # (N, B, C)
    pixels = pixels + state["attnpool.positional_embedding"][:, None]
    part = {
        at: F.linear(pixels, state[f"attnpool.{at}_proj.weight"], state[f"attnpool.{at}_proj.bias"]) for at in "qkv"
    }
    split = {at: value.unflatten(2, (heads, -1)) for at, value in part.items()}  # (N, B, heads, d)
    weights = torch.einsum("bhd,nbhd->nbh", split["q"][0], split["k"]) / split["q"].shape[-1] ** 0.5
    pooled = torch.einsum("nbh,nbhd->bhd", weights.softmax(0), split["v"]).flatten(1)
    return F.linear(pooled, state["attnpool.c_proj.weight"], state["attnpool.c_proj.bias"])


def test_the_image_tower_equals_a_naive_one_in_float64():
    model = tiny().double()
    with torch.no_grad():
        for _ in range(3):
            model.encode_image(batch(dtype=torch.float64)[0])  # statistics other than those at the start
    model.eval()
    images = batch(3, torch.float64)[0]
    expected = naive_resnet(model.visual.state_dict(), images, TINY["vision_layers"], TINY["vision_heads"])
    torch.testing.assert_close(model.encode_image(images), expected)


def test_every_parameter_gets_a_gradient_from_the_loss():
    model = tiny()
    ContrastiveLoss()(model(batch())).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["visual.attnpool.k_proj.bias"] or not without  # adding to all keys changes no softmax


def test_a_published_start_lets_nothing_through_the_branches():
    model = tiny(loud=False)
    block = model.visual.layer2[1]
    x = torch.randn(2, 32, 8, 8).abs()
    assert torch.equal(block(x), x)


def test_bfloat16_is_near_float32():
    images, tokens, end = batch()
    expected = tiny()((images, tokens, end))
    with torch.autocast("cpu", torch.bfloat16):
        autocast = tiny()((images, tokens, end))
    for features in (autocast, tiny().bfloat16()((images, tokens, end))):
        for one, other in zip(features, expected, strict=True):
            assert one.dtype == torch.bfloat16
            assert F.cosine_similarity(one.float(), other).min() > 0.98


# Cells


def test_cells_and_boundaries():
    model = tiny()
    kinds = [type(cell).__name__ for cell in model.cells()]
    assert kinds == ["PixelStem", *["PixelCell"] * 6, "TextStem", *["TextBlock"] * 3, "TextHead"]
    x, sides = batch(2), []
    for cell in model.cells()[:7]:
        x = cell(x)
        sides.append(tuple(x[0].shape[1:]))
    assert sides == [(4, 16, 16), (16, 16, 16), (32, 8, 8), (32, 8, 8), (64, 4, 4), (128, 2, 2), (10,)]
    held = [id(parameter) for cell in model.cells() for parameter in cell.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


def test_every_boundary_profiles_and_estimates():
    measured = profile(tiny(), batch(4), chunks=2, repeats=1)
    with torch.device("meta"):
        inputs = tuple(part.to("meta") for part in batch(4))
        estimated = estimate(tiny(), inputs, speed=Speed(1e9, 1e9), chunks=2)
    assert [cost.boundary_bytes for cost in measured] == [cost.boundary_bytes for cost in estimated]
    assert len(measured) == 12
    assert measured[0].boundary_bytes == 2 * (4 * 4 * 16 * 16 + 8 * 7 + 8)
    assert sum(cost.parameter_bytes for cost in measured) == 4 * sum(p.numel() for p in tiny().parameters())


# Under a pipeline


def test_pipelines_train_to_the_same_bits():
    assert_exact(tiny(), batch(4), loss_fn=loss_of, stages=(2, 3), chunks=2, checkpoints=("always", "never"), steps=2)


@pytest.mark.parametrize("balance", [[5, 7], [3, 4, 5]], ids=str)
def test_pipelined_gradients_are_those_of_the_model(balance):
    model = tiny().double()
    alike = tuple(part.repeat(3, *[1] * (part.ndim - 1)) for part in batch(2, torch.float64))
    plain = copy.deepcopy(model)
    loss_of(plain(alike)).backward()  # micro-batches are alike, so batch norm gives what it gives for the whole
    pipe = make_pipe(model, balance)
    assert list(pipe.state_dict()) == list(plain.state_dict())
    loss_of(pipe(alike)).backward()
    for (name, parameter), expected in zip(pipe.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("balance", [[5, 7], [3, 4, 5]], ids=str)
def test_deferred_batch_norm_leaves_the_statistics_of_the_whole_batch(balance):
    alike = tuple(part.repeat(3, *[1] * (part.ndim - 1)) for part in batch(2))
    model, plain = tiny(), tiny()
    plain(alike)
    make_pipe(model, balance, deferred_batch_norm=True)(alike)
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
    model, plain = tiny(), tiny()
    plain(batch())
    make_pipe(model, balance, deferred_batch_norm=True)(batch())
    torch.testing.assert_close(model.visual.bn1.running_var, plain.visual.bn1.running_var)
    torch.testing.assert_close(model.visual.bn1.running_mean, plain.visual.bn1.running_mean)
    assert model.visual.layer4[0].bn3.num_batches_tracked == 1


def test_a_pipe_in_eval_mode_is_the_model():
    model = tiny()
    found = make_pipe(model, [5, 7]).eval()(batch())
    for one, other, third in zip(found, PlainLoop(model)(batch()), model(batch()), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third, rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ViT-B-32"}, "name to be one of 'RN50', .* given 'ViT-B-32'"),
        ({"image_size": 80}, "image_size to be a multiple of the ResNet's reduction, .*=80 .* 64 or 96"),
        ({"vision_width": 5}, "vision_width to be a multiple of the stem's 2 steps, given vision_width=5"),
        ({"vision_heads": 3}, "32 vision_width to be a multiple of vision_heads, .*=128 and vision_heads=3"),
        ({"vision_layers": (1, 2, 1)}, r"vision_layers of a ResNet to be four .* given \(1, 2, 1\)"),
        ({"vision_layers": (1, 0, 1, 1)}, r"vision_layers\[1\] to be a whole number of at least 1, given 0"),
        ({"patch_size": 8}, r"no patch_size for a ResNet, given 8 .*leave it out"),
        ({"embed_dim": 0}, "embed_dim .* given 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


@pytest.mark.parametrize("missing", ["activation", "embed_dim", "vision_layers"])
def test_without_a_name_all_sizes_are_asked_for(missing):
    settings = {key: value for key, value in TINY.items() if key != missing}
    with pytest.raises(TypeError, match=f"published name or all sizes, given none for .*{missing}; give .* 'RN50'"):
        clip(**settings)


def test_the_command_line_names_missing_sizes(tmp_path):
    file = write(tmp_path, model={"factory": "gpipe.models.clip.clip", "arguments": {"image_size": 8}})
    with pytest.raises(
        ConfigurationError, match=r"model.factory: .*all sizes, given none for patch_size, .*activation"
    ):
        run(file)


def test_images_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"CLIP images: expected shape \(B, 3, 64, 64\), given \(2, 3, 32, 32\); resize"
    ):
        tiny().encode_image(torch.randn(2, 3, 32, 32))
    images, tokens, end = batch(3)
    with pytest.raises(ValueError, match="given 3 images and 2 texts"):
        tiny()((images, tokens[:2], end[:2]))
