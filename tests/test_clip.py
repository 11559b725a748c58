"""CLIP: the published counts, names and start values, its cells, and both towers against restatements."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from nets import loud
from torch import nn

from gpipe import GPipe
from gpipe.models.attention import Attention, Block, LayerNorm, QuickGELU
from gpipe.models.clip import CLIP, clip
from gpipe.models.clip_vision import VisionTransformer
from gpipe.models.contrastive import ContrastiveLoss

SMALL = {
    "image_size": 8,
    "patch_size": 4,
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 12,
    "text_layers": 3,
    "text_heads": 3,
    "embed_dim": 10,
    "activation": "quick_gelu",
    "context_length": 7,
    "vocabulary_size": 20,
}

VIT_B = {
    "image_size": 224,
    "vision_width": 768,
    "vision_layers": 12,
    "vision_heads": 12,
    "text_width": 512,
    "text_layers": 12,
    "text_heads": 8,
    "embed_dim": 512,
    "activation": "quick_gelu",
}
VIT_L = {
    "patch_size": 14,
    "vision_width": 1024,
    "vision_layers": 24,
    "vision_heads": 16,
    "text_width": 768,
    "text_layers": 12,
    "text_heads": 12,
    "embed_dim": 768,
    "activation": "quick_gelu",
}
# Settings, parameters and keys in the state dict, logit_scale among both.
PUBLISHED = {
    "ViT-B/32": (VIT_B | {"patch_size": 32}, 151277313, 302),
    "ViT-B/16": (VIT_B | {"patch_size": 16}, 149620737, 302),
    "ViT-L/14": (VIT_L | {"image_size": 224}, 427616513, 446),
    "ViT-L/14@336px": (VIT_L | {"image_size": 336}, 427944193, 446),
}


def small(**settings: object) -> CLIP:
    torch.manual_seed(1)
    return clip(**SMALL | settings)


def batch(rows: int = 3, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(rows, 3, 8, 8, generator=generator, dtype=dtype)
    tokens = torch.randint(20, (rows, 7), generator=generator)
    return images, tokens, torch.arange(rows) + 2


# Published counts, names and start values


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    settings, parameters, keys = PUBLISHED[name]
    with torch.device("meta"):
        model, loss = clip(**settings), ContrastiveLoss()
    assert sum(p.numel() for module in (model, loss) for p in module.parameters()) == parameters
    assert len(model.state_dict() | loss.state_dict()) == keys
    assert not list(model.buffers())


def test_published_keys_and_shapes():
    block = {
        "attn.in_proj_weight": (3, 1),
        "attn.in_proj_bias": (3,),
        "attn.out_proj.weight": (1, 1),
        "attn.out_proj.bias": (1,),
        "ln_1.weight": (1,),
        "ln_1.bias": (1,),
        "mlp.c_fc.weight": (4, 1),
        "mlp.c_fc.bias": (4,),
        "mlp.c_proj.weight": (1, 4),
        "mlp.c_proj.bias": (1,),
        "ln_2.weight": (1,),
        "ln_2.bias": (1,),
    }
    expected = {
        "positional_embedding": (7, 12),
        "text_projection": (12, 10),
        "logit_scale": (),
        "token_embedding.weight": (20, 12),
        "ln_final.weight": (12,),
        "ln_final.bias": (12,),
        "visual.class_embedding": (16,),
        "visual.positional_embedding": (5, 16),
        "visual.proj": (16, 10),
        "visual.conv1.weight": (16, 3, 4, 4),
        "visual.ln_pre.weight": (16,),
        "visual.ln_pre.bias": (16,),
        "visual.ln_post.weight": (16,),
        "visual.ln_post.bias": (16,),
    }
    for prefix, width, layers in [("visual.", 16, 2), ("", 12, 3)]:
        for layer in range(layers):
            for key, shape in block.items():
                where = f"{prefix}transformer.resblocks.{layer}.{key}"
                expected[where] = tuple(size * width for size in shape)
    state = small().state_dict() | ContrastiveLoss().state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


def spread(tensor: torch.Tensor, std: float) -> None:
    """Hold a tensor to a standard deviation, within four standard errors of its estimate."""
    assert abs(tensor.mean().item()) < 4 * std / math.sqrt(tensor.numel())
    assert tensor.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * tensor.numel()))


def test_text_start_values_are_the_published_ones():
    width, layers = 48, 3
    model = small(text_width=width, text_layers=layers, vocabulary_size=200, context_length=40, embed_dim=30)
    spread(model.token_embedding.weight, 0.02)
    spread(model.positional_embedding, 0.01)
    spread(model.text_projection, width**-0.5)
    for block in model.transformer.blocks():
        spread(block.attn.in_proj_weight, width**-0.5)
        spread(block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
        spread(block.mlp.c_fc.weight, (2 * width) ** -0.5)
        spread(block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
        assert not block.attn.in_proj_bias.any()
        assert not block.attn.out_proj.bias.any()


def test_image_start_values_are_the_published_ones():
    width = 48
    visual = small(vision_width=width, image_size=24, patch_size=4, embed_dim=30).visual
    for parameter in (visual.class_embedding, visual.positional_embedding, visual.proj):
        spread(parameter, width**-0.5)
    for block in visual.transformer.blocks():
        bound = math.sqrt(6 / (4 * width))  # Xavier, as in nn.MultiheadAttention
        assert 0.99 * bound < block.attn.in_proj_weight.abs().max() <= bound
        spread(block.attn.in_proj_weight, bound / math.sqrt(3))
        assert not block.attn.in_proj_bias.any()
        assert not block.attn.out_proj.bias.any()
        for linear, inputs in [
            (block.attn.out_proj, width),
            (block.mlp.c_fc, width),
            (block.mlp.c_proj, 4 * width),
        ]:
            assert 0.99 * inputs**-0.5 < linear.weight.abs().max() <= inputs**-0.5  # nn.Linear's default


def test_the_same_seed_gives_the_same_model():
    one, other = small().state_dict(), small().state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


# The architecture, against plain restatements


def naive_block(block: Block, x: torch.Tensor, activation: str, mask: torch.Tensor | None) -> torch.Tensor:
    attention = nn.MultiheadAttention(x.shape[-1], block.attn.heads, batch_first=True, dtype=x.dtype)
    attention.load_state_dict(block.attn.state_dict())
    state = block.state_dict()

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    y = norm("ln_1", x)
    x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
    y = norm("ln_2", x) @ state["mlp.c_fc.weight"].T + state["mlp.c_fc.bias"]
    y = y / (1 + (-1.702 * y).exp()) if activation == "quick_gelu" else y * (1 + torch.erf(y / 2**0.5)) / 2
    return x + y @ state["mlp.c_proj.weight"].T + state["mlp.c_proj.bias"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_block_equals_a_naive_one(activation, causal):
    torch.manual_seed(0)
    block = loud(Block(12, 3, activation, causal=causal).double())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    mask = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1) if causal else None
    torch.testing.assert_close(block(x), naive_block(block, x, activation, mask))


def naive_clip(model: CLIP, images: torch.Tensor, tokens: torch.Tensor, end: torch.Tensor):
    visual = model.visual
    rows = []
    for image in images:
        patches = [
            torch.einsum("cij,wcij->w", image[:, i : i + 4, j : j + 4], visual.conv1.weight)
            for i in (0, 4)
            for j in (0, 4)
        ]
        rows.append(torch.stack([visual.class_embedding, *patches]) + visual.positional_embedding)
    x = F.layer_norm(torch.stack(rows), (16,), visual.ln_pre.weight, visual.ln_pre.bias)
    for block in visual.transformer.blocks():
        x = naive_block(block, x, "quick_gelu", None)
    image_features = F.layer_norm(x[:, 0], (16,), visual.ln_post.weight, visual.ln_post.bias) @ visual.proj
    x = torch.stack([model.token_embedding.weight[row] + model.positional_embedding for row in tokens])
    mask = torch.full((7, 7), -math.inf, dtype=x.dtype).triu(1)
    for block in model.transformer.blocks():
        x = naive_block(block, x, "quick_gelu", mask)
    x = F.layer_norm(x, (12,), model.ln_final.weight, model.ln_final.bias)
    text_features = torch.stack([row[last] for row, last in zip(x, end, strict=True)]) @ model.text_projection
    return image_features, text_features


def test_the_model_equals_a_naive_one_in_float64():
    model = loud(small().double())
    inputs = batch(dtype=torch.float64)
    features = model(inputs)
    assert [feature.shape for feature in features] == [(3, 10), (3, 10)]
    assert all(feature.dtype == torch.float64 for feature in features)
    torch.testing.assert_close(features, naive_clip(model, *inputs))


def test_quick_gelu_is_not_gelu():
    inputs = batch()
    quick, exact = (loud(small(activation=name))(inputs) for name in ("quick_gelu", "gelu"))
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(quick, exact, strict=True))
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(QuickGELU()(x), x * torch.sigmoid(1.702 * x))


def test_later_tokens_do_not_reach_earlier_ones():
    attention = loud(Attention(12, 3, causal=True))
    x = torch.randn(2, 6, 12)
    changed = x.clone()
    changed[:, 4] += 1
    before, after = attention(x), attention(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=0)
    assert (before[:, 4:] - after[:, 4:]).abs().amax((0, 2)).min() > 1e-3


def test_a_text_is_what_stands_up_to_its_end():
    model = loud(small())
    _, tokens, _ = batch(1)
    end = torch.tensor([3])
    features = model.encode_text(tokens, end)
    for position in range(7):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 20
        difference = (model.encode_text(changed, end) - features).abs().max()
        assert difference > 1e-3 if position <= 3 else difference == 0
    torch.testing.assert_close(model.encode_text(tokens[:, :4], end), features)


def test_every_patch_reaches_the_image_feature():
    model = loud(small())
    images = batch(1)[0].requires_grad_()
    model.encode_image(images).sum().backward()
    assert (images.grad.abs().amax(1) > 0).all()


def test_layer_norm_computes_in_float32_and_returns_the_input_dtype():
    torch.manual_seed(0)
    x = (torch.randn(4, 64) * 3 + 100).bfloat16()
    norm = loud(LayerNorm(64)).bfloat16()
    expected = F.layer_norm(x.float(), (64,), norm.weight.float(), norm.bias.float()).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), expected)
    mixed = loud(LayerNorm(64))  # float32 gains, as under autocast
    expected = F.layer_norm(x.float(), (64,), mixed.weight, mixed.bias).bfloat16()
    assert torch.equal(mixed(x), expected)
    x64 = torch.randn(4, 64, dtype=torch.float64) * 1e-9 + 1
    assert norm.double()(x64).dtype == torch.float64
    assert (LayerNorm(64)(x64).std(-1) > 0).all()  # would be lost in float32


# The two towers


def test_forward_is_both_encoders():
    model = loud(small())
    images, tokens, end = batch()
    image_features, text_features = model((images, tokens, end))
    assert torch.equal(model.encode_image(images), image_features)
    assert torch.equal(model.encode_text(tokens, end), text_features)


def test_every_parameter_gets_a_gradient_from_the_loss():
    model, loss = loud(small()), ContrastiveLoss()
    loss(model(batch())).backward()
    named = [*model.named_parameters(), *loss.named_parameters()]
    assert [name for name, parameter in named if parameter.grad is None or not parameter.grad.any()] == []


def test_a_few_steps_lower_the_loss():
    model, loss = small(), ContrastiveLoss()
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], lr=3e-3)
    inputs = batch(5)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        value = loss(model(inputs))
        value.backward()
        optimizer.step()
        loss.clamp_()
        values.append(value.item())
    assert values[-1] < values[0] / 4


def test_no_rows_give_no_features():
    images, tokens, end = batch()
    assert [feature.shape for feature in small()((images[:0], tokens[:0], end[:0]))] == [(0, 10), (0, 10)]


def test_other_channel_counts():
    model = small(in_channels=1)
    assert model.encode_image(torch.randn(2, 1, 8, 8)).shape == (2, 10)


# Cells


def test_cells_are_the_image_tower_then_the_text_tower():
    kinds = [type(cell).__name__ for cell in small().cells()]
    image = ["ImageStem", "ImageBlock", "ImageBlock", "ImageHead"]
    assert kinds == [*image, "TextStem", "TextBlock", "TextBlock", "TextBlock", "TextHead"]


def test_what_passes_the_boundaries():
    inputs = batch()
    shapes = []
    x = inputs
    for cell in small().cells():
        x = cell(x)
        shapes.append([tuple(part.shape) for part in x])
    patches = [(3, 5, 16), (3, 7), (3,)]
    words = [(3, 10), (3, 7, 12), (3,)]
    pooled = [(3, 10), (3, 7), (3,)]
    assert shapes == [patches] * 3 + [pooled] + [words] * 4 + [[(3, 10), (3, 10)]]


def test_each_parameter_is_in_exactly_one_cell():
    model = small()
    held = [id(parameter) for cell in model.cells() for parameter in cell.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


def test_cells_are_fresh_and_not_in_the_state_dict():
    model = small()
    keys = list(model.state_dict())
    one, other = model.cells(), model.cells()
    assert not {id(cell) for cell in one} & {id(cell) for cell in other}
    model(batch())
    assert list(model.state_dict()) == keys


def test_cells_take_the_mode_of_the_model_and_leave_its_parts_alone():
    model = small().eval()
    assert not any(cell.training for cell in model.cells())
    model.train()
    model.visual.transformer.eval()
    assert all(cell.training for cell in model.cells())
    assert not model.visual.transformer.resblocks[0].training
    model.cells()[1].eval()
    assert not model.visual.transformer.resblocks[0].attn.training


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_compute_the_same_with_parameters_of_their_own(duplicate):
    model = loud(small())
    expected = model(batch())
    cells, whole = duplicate((model.cells(), model))
    x = batch()
    for cell in cells:
        x = cell(x)
    for one, other, third in zip(x, expected, whole(batch()), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)
    held = {id(parameter) for cell in cells for parameter in cell.parameters()}
    assert held == {id(parameter) for parameter in whole.parameters()}
    assert not held & {id(parameter) for parameter in model.parameters()}


def test_weights_load_strictly_into_another_model():
    source, target = loud(small()), small()
    target.load_state_dict(source.state_dict())
    for one, other in zip(source(batch()), target(batch()), strict=True):
        assert torch.equal(one, other)


# Numeric types and dropout


def test_bfloat16_autocast_is_near_float32_and_trains():
    model, loss = loud(small()), ContrastiveLoss()
    expected = model(batch())
    with torch.autocast("cpu", torch.bfloat16):
        features = model(batch())
        loss(features).backward()
    for one, other in zip(features, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert F.cosine_similarity(one.float(), other).min() > 0.99
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_model_in_bfloat16_takes_float32_images():
    features = small().bfloat16()(batch())
    assert all(feature.dtype == torch.bfloat16 for feature in features)


def test_dropout_draws_in_training_only():
    model = loud(small(dropout=0.5))
    reference = loud(small())(batch())
    torch.manual_seed(0)
    one, other = model(batch()), model(batch())
    torch.manual_seed(0)
    again = model(batch())
    model.eval()
    for first, second, third, still, plain in zip(one, other, again, model(batch()), reference, strict=True):
        assert not torch.allclose(first, second)
        assert torch.equal(first, third)
        assert torch.equal(still, plain)


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_dropout_reaches_each_branch(part):
    torch.manual_seed(0)
    block = loud(Block(12, 3, "gelu", dropout=0.5))
    block.attn.dropout = 0.0
    with torch.no_grad():
        silenced = block.mlp.c_proj if part == "attn" else block.attn.out_proj
        silenced.weight.zero_()
        silenced.bias.zero_()
    x = torch.randn(2, 5, 12)
    assert not torch.allclose(block(x), block(x))


def test_attention_weights_are_dropped():
    attention = loud(Attention(12, 3, dropout=0.5))
    x = torch.randn(2, 5, 12)
    assert not torch.allclose(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))


# Under a pipeline


def trained(balance: list[int], checkpoint: str) -> list[torch.Tensor]:
    model, loss = loud(small(dropout=0.3)), ContrastiveLoss()
    devices = ["cpu"] * len(balance)
    pipe = GPipe(model, balance=balance, devices=devices, chunks=2, checkpoint=checkpoint, seed=5)
    assert list(pipe.state_dict()) == list(model.state_dict())
    optimizer = torch.optim.AdamW([*pipe.parameters(), *loss.parameters()], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss(pipe(batch(5))).backward()
        optimizer.step()
        loss.clamp_()
    return [parameter.detach() for parameter in [*model.parameters(), *loss.parameters()]]


@pytest.mark.parametrize("checkpoint", ["always", "except_last", "never"])
@pytest.mark.parametrize("balance", [[4, 5], [2, 3, 4], [1] * 9], ids=str)
def test_every_partition_trains_to_the_same_bits_with_dropout(balance, checkpoint):
    for one, other in zip(trained(balance, checkpoint), trained([9], "never"), strict=True):
        assert torch.equal(one, other)


def test_pipelined_gradients_are_those_of_the_model():
    model, loss = loud(small().double()), ContrastiveLoss().double()
    inputs = batch(5, torch.float64)
    parameters = [*model.parameters(), *loss.parameters()]
    expected = torch.autograd.grad(loss(model(inputs)), parameters)
    loss(GPipe(model, balance=[3, 3, 3], devices=["cpu"] * 3, chunks=3)(inputs)).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-11)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 10}, "image_size to be a multiple of patch_size, .*=10 and .*=4; .* 8 or 12"),
        ({"image_size": 2}, "image_size to be a multiple of patch_size, .*=2 and .*=4; set image_size to 4"),
        ({"vision_heads": 3}, "vision_width to be a multiple of vision_heads, given vision_width=16"),
        ({"text_heads": 5}, "text_width to be a multiple of text_heads, .*=12 and text_heads=5"),
        ({"vision_layers": 0}, "vision_layers to be a whole number of at least 1, given 0"),
        ({"text_layers": -1}, "text_layers .* given -1"),
        ({"text_width": "12"}, "text_width .* given '12'"),
        ({"vision_width": 16.0}, r"vision_width .* given 16\.0"),
        ({"embed_dim": True}, "embed_dim .* given True"),
        ({"patch_size": 0}, "patch_size .* given 0"),
        ({"in_channels": 0}, "in_channels .* given 0"),
        ({"context_length": 0}, "context_length .* given 0"),
        ({"vocabulary_size": None}, "vocabulary_size .* given None"),
        ({"activation": "relu"}, "activation to be one of 'quick_gelu', 'gelu', given 'relu'"),
        ({"activation": ["gelu"]}, r"activation to be one of .* given \['gelu'\]"),
        ({"dropout": 1.0}, r"dropout to be a number of at least 0 and below 1, given 1\.0"),
        ({"dropout": -0.1}, r"dropout .* given -0\.1"),
        ({"dropout": "0.1"}, r"dropout .* given '0\.1'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_the_activation_must_be_stated():
    settings = {key: value for key, value in SMALL.items() if key != "activation"}
    with pytest.raises(TypeError, match="activation"):
        clip(**settings)


def test_parts_refuse_what_they_cannot_be_built_from():
    with pytest.raises(ValueError, match="width to be a multiple of heads, given width=10 and heads=3"):
        Attention(10, 3)
    with pytest.raises(ValueError, match="activation to be one of"):
        Block(12, 3, "tanh")
    vision = {key: SMALL[key] for key in SMALL if key.startswith("vision_")}
    with pytest.raises(ValueError, match=r"image_size .* given -8"):
        VisionTransformer(image_size=-8, patch_size=4, embed_dim=10, activation="gelu", **vision)


@pytest.mark.parametrize("shape", [(3, 3, 8, 9), (3, 1, 8, 8), (3, 8, 8), (3, 3, 16, 16)])
def test_images_of_another_shape_are_refused(shape):
    _, tokens, end = batch()
    message = rf"CLIP images: expected shape \(B, 3, 8, 8\), given {re.escape(str(shape))}; resize"
    with pytest.raises(ValueError, match=message):
        small()((torch.randn(shape), tokens, end))
    with pytest.raises(ValueError, match=message):
        small().encode_image(torch.randn(shape))


def test_images_of_bytes_are_refused():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"floating dtype, given torch\.uint8; scale"):
        small().encode_image(images)


def test_more_images_than_texts_are_refused():
    images, tokens, end = batch()
    with pytest.raises(ValueError, match="given 3 images and 2 texts; pass one text per image"):
        small()((images, tokens[:2], end[:2]))


BAD_TEXTS = [
    (torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), "context_length=7 .* given 8"),
    (torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), r"shape \(B, T\) .* given \(3,\)"),
    (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), r"given \(3, 4\) and \(2,\)"),
    (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), r"int64, given torch\.float32 and torch\.int64"),
    (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), r"and torch\.int32; .*long"),
    (
        torch.full((3, 4), 20),
        torch.zeros(3, dtype=torch.int64),
        "ids from 0 to 19 .* given ids from 20 to 20",
    ),
    (torch.full((3, 4), -1), torch.zeros(3, dtype=torch.int64), "given ids from -1 to -1; use the tokenizer"),
    (torch.zeros(3, 4, dtype=torch.int64), torch.full((3,), 4), "end indices from 0 to 3 .* from 4 to 4"),
    (
        torch.zeros(3, 4, dtype=torch.int64),
        torch.full((3,), -1),
        "end indices .* given indices from -1 to -1",
    ),
]


@pytest.mark.parametrize(("tokens", "end", "message"), BAD_TEXTS)
def test_texts_the_model_cannot_read_are_refused_by_the_first_cell(tokens, end, message):
    images, _, _ = batch()
    model = small()
    with pytest.raises(ValueError, match=f"CLIP texts: expected .*{message}"):
        model.cells()[0]((images, tokens, end))
    with pytest.raises(ValueError, match=f"CLIP texts: expected .*{message}"):
        model.encode_text(tokens, end)


def test_a_missing_text_is_refused():
    with pytest.raises(ValueError, match=r"given None for the tokens .* call encode_image for images alone"):
        small()((batch()[0], None, None))


def test_the_meta_device_gives_shapes_without_looking_at_values():
    with torch.device("meta"):
        features = small()((torch.empty(3, 3, 8, 8), torch.empty(3, 7).long(), torch.empty(3).long()))
    assert [tuple(feature.shape) for feature in features] == [(3, 10), (3, 10)]
