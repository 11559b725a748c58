"""CLIP's weights in the files of others: read, refused, written."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_clip import SMALL, loud, small
from test_clip_resnet import tiny
from test_torchscript_archive import archived
from torch import nn

from gpipe.models.clip import clip
from gpipe.models.clip_layouts import from_hugging_face, to_hugging_face
from gpipe.models.clip_weights import load_weights, published_name, read_weights, save_weights
from gpipe.models.contrastive import ContrastiveLoss, SigmoidLoss
from gpipe.ranks.deferred import recorded


def published(make=small):
    """A model and a loss that differ from those at the start, and all their weights."""
    model, loss = loud(make()), loud(ContrastiveLoss())
    return model, loss, model.state_dict() | loss.state_dict()


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name].dtype == value.dtype, name
        assert torch.equal(one[name], value), name


class Holder(nn.Module):
    """A module with given tensors at given names, and the numbers OpenAI's archives have besides."""

    def __init__(self, tensors, **numbers):
        super().__init__()
        for name, value in tensors.items():
            *path, last = name.split(".")
            at = self
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = at._modules[part]
            at.register_buffer(last, value)
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x):
        return x


def openai(path, state):
    """An archive as OpenAI publishes them: TorchScript, half precision but for a few, and three numbers."""
    halves = {k: v.half() if v.is_floating_point() and "ln_" not in k else v for k, v in state.items()}
    archived(path, module=Holder(halves, input_resolution=8, context_length=7, vocab_size=20))
    return halves


def open_clip_training(path, state):
    torch.save({"epoch": 3, "name": "run", "state_dict": {f"module.{name}": v for name, v in state.items()}}, path)


WRITERS = {
    "openai.pt": openai,
    "state.bin": lambda path, state: torch.save(dict(state), path),
    "legacy.pt": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
    "epoch_3.pt": open_clip_training,
    "open_clip.safetensors": lambda path, state: save_file(dict(state), path),
}


@pytest.mark.parametrize("make", [small, tiny], ids=["ViT", "RN"])
@pytest.mark.parametrize("file", WRITERS)
def test_files_load_strictly(file, make, tmp_path):
    _, _, state = published(make)
    expected = WRITERS[file](tmp_path / file, state) or state
    model, loss = make(), ContrastiveLoss()
    load_weights(tmp_path / file, model, loss, activation="quick_gelu")
    found = model.state_dict() | loss.state_dict()
    assert_same(found, {name: value.to(state[name].dtype) for name, value in expected.items()})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_half_precision_is_converted_as_asked(tmp_path):
    _, _, state = published()
    halves = openai(tmp_path / "a.pt", state)
    assert_same(read_weights(tmp_path / "a.pt"), halves)
    assert_same(read_weights(tmp_path / "a.pt", dtype=torch.float32), {k: v.float() for k, v in halves.items()})
    model = small().bfloat16()
    load_weights(tmp_path / "a.pt", model, activation="quick_gelu")
    assert_same(model.state_dict(), {k: v.bfloat16() for k, v in halves.items() if k != "logit_scale"})
    _, _, state = published(tiny)
    save_file(dict(state), tmp_path / "b.safetensors")
    counts = [v.dtype for k, v in read_weights(tmp_path / "b.safetensors", dtype=torch.half).items() if "num" in k]
    assert set(counts) == {torch.int64}  # no weights


def test_without_a_loss_the_temperature_is_left_out(tmp_path):
    source, _, state = published()
    save_file(dict(state), tmp_path / "a.safetensors")
    model = clip(**SMALL, weights=str(tmp_path / "a.safetensors"), freeze="image")
    assert_same(model.state_dict(), source.state_dict())
    assert not model.visual.proj.requires_grad


def test_a_rank_that_makes_its_values_later_gets_those_of_the_file(tmp_path):
    source, _, state = published()
    save_file(dict(state), tmp_path / "a.safetensors")
    built = recorded(lambda: clip(**SMALL, weights=str(tmp_path / "a.safetensors"), freeze="text"))
    assert all(parameter.is_meta for parameter in built.module.parameters())
    built.materialise(built.module.named_parameters(), seed=0)
    assert_same(built.module.state_dict(), source.state_dict())
    assert not built.module.text_projection.requires_grad


# Hugging Face's layout


def hugging_face_names(layers):
    block = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"]
    block += ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    both = {
        f"{tower}_model.encoder.layers.{n}.{part}" for tower in layers for n in range(layers[tower]) for part in block
    }
    both |= {"text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"}
    names = {f"{part}.{kind}" for part in both for kind in ("weight", "bias")}
    embeddings = ["text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"]
    embeddings += ["vision_model.embeddings.patch_embedding", "vision_model.embeddings.position_embedding"]
    names |= {f"{part}.weight" for part in [*embeddings, "text_projection", "visual_projection"]}
    return names | {"vision_model.embeddings.class_embedding", "logit_scale"}


def test_hugging_faces_names_and_values():
    _, _, state = published()
    there = to_hugging_face(state)
    assert there.keys() == hugging_face_names({"text": 3, "vision": 2})
    assert torch.equal(there["text_projection.weight"], state["text_projection"].T)
    assert torch.equal(there["visual_projection.weight"], state["visual.proj"].T)
    for tower, ours in (("text", ""), ("vision", "visual.")):
        at, part = (
            f"{tower}_model.encoder.layers.1.self_attn",
            state[f"{ours}transformer.resblocks.1.attn.in_proj_weight"],
        )
        assert torch.equal(torch.cat([there[f"{at}.{x}_proj.weight"] for x in "qkv"]), part)
        assert torch.equal(
            there[f"{tower}_model.encoder.layers.1.mlp.fc2.bias"],
            state[f"{ours}transformer.resblocks.1.mlp.c_proj.bias"],
        )
        assert torch.equal(
            there[f"{tower}_model.encoder.layers.0.layer_norm2.weight"],
            state[f"{ours}transformer.resblocks.0.ln_2.weight"],
        )
    assert_same(from_hugging_face(there), state)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hugging_faces_files_load_both_ways(suffix, tmp_path):
    source, source_loss, state = published()
    save_weights(tmp_path / "model.safetensors", source, source_loss, layout="hugging_face")
    there = load_file(tmp_path / "model.safetensors")
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    path = tmp_path / f"model.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(there | positions, path)
    model, loss = small(), ContrastiveLoss()
    load_weights(path, model, loss, activation="quick_gelu")
    assert_same(model.state_dict() | loss.state_dict(), state)


def test_a_split_projection_that_is_not_whole_is_missing(tmp_path):
    there = to_hugging_face(published()[2])
    del there["text_model.encoder.layers.2.self_attn.k_proj.bias"]
    save_file(there, tmp_path / "a.safetensors")
    message = r"lacks transformer\.resblocks\.2\.attn\.in_proj_bias; has unknown .*layers\.2\.self_attn\.q_proj\.bias"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "a.safetensors", small(), activation="quick_gelu")


def test_a_resnet_has_no_place_in_hugging_faces_layout(tmp_path):
    with pytest.raises(ValueError, match=r"Vision Transformer, given \d+ that .* has no name for, such as visual\."):
        save_weights(tmp_path / "a.safetensors", tiny(), layout="hugging_face")
    assert not list(tmp_path.iterdir())


# Writing


@pytest.mark.parametrize("make", [small, tiny], ids=["ViT", "RN"])
def test_saved_weights_are_the_published_whole(make, tmp_path):
    model, loss, state = published(make)
    save_weights(tmp_path / "a.safetensors", model, loss)
    assert_same(load_file(tmp_path / "a.safetensors"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    save_weights(tmp_path / "a.safetensors", model, dtype=torch.bfloat16)
    found = load_file(tmp_path / "a.safetensors")
    assert_same(
        found, {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items() if k != "logit_scale"}
    )


def test_a_sigmoid_loss_has_its_bias_in_the_file(tmp_path):
    save_weights(tmp_path / "a.safetensors", small(), loud(source := SigmoidLoss()))
    load_weights(tmp_path / "a.safetensors", small(), loss := SigmoidLoss(), activation="quick_gelu")
    assert_same(loss.state_dict(), source.state_dict())
    message = "has unknown logit_bias; give the loss that the weights were trained with, or none"
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path / "a.safetensors", small(), ContrastiveLoss(), activation="quick_gelu")


# What is refused, whole


def refused(tmp_path, state, message, model=None, loss=None, error=ValueError, **options):
    """The file is refused, and nothing of it was loaded."""
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "a.safetensors")
    model = small() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_weights(tmp_path / "a.safetensors", model, loss, **{"activation": "quick_gelu"} | options)
    assert_same(model.state_dict(), before)


def test_missing_and_unknown_weights_are_named(tmp_path):
    state = published()[2]
    refused(tmp_path, state | {"extra": torch.ones(1)}, "a.safetensors, which has unknown extra; build the model")
    some = {name: value for name, value in state.items() if not name.startswith("visual.ln")}
    refused(
        tmp_path, some, "lacks visual.ln_pre.weight, visual.ln_pre.bias, visual.ln_post.weight, visual.ln_post.bias;"
    )
    none = {name: value for name, value in state.items() if not name.startswith("visual.")}
    refused(tmp_path, none, r"lacks visual\.class_embedding, .* and \d+ more; ")
    other = state | {"text_projection": torch.ones(12, 11), "positional_embedding": torch.ones(7, 12).long()}
    refused(
        tmp_path,
        other,
        r"positional_embedding: \(7, 12\) torch\.int64, not \(7, 12\) torch\.float32, text_projection: \(12, 11\) "
        r"torch\.float32, not \(12, 10\) torch\.float32; build the model with the sizes",
    )


def test_a_missing_temperature_is_missing_only_where_there_is_a_loss(tmp_path):
    state = published()[0].state_dict()
    refused(tmp_path, state, "lacks logit_scale; give the loss that .* or none", loss=ContrastiveLoss())
    load_weights(tmp_path / "a.safetensors", small(), activation="quick_gelu")


def test_the_activation_has_to_be_stated_and_be_the_models(tmp_path):
    state = published()[2]
    message = "the model's activation 'quick_gelu', given activation='gelu'; build the model with activation='gelu'"
    refused(tmp_path, state, message, activation="gelu")
    refused(tmp_path, state, "activation to be one of 'quick_gelu', 'gelu', given 'relu'", activation="relu")
    with pytest.raises(TypeError, match="activation"):
        load_weights(tmp_path / "a.safetensors", small())
    message = "given none for activation; state the activation the weights were trained with"
    with pytest.raises(TypeError, match=message):
        clip("ViT-B/32", weights=str(tmp_path / "a.safetensors"))


def test_weights_of_another_published_size_are_recognised(tmp_path):
    for name in ("RN50", "ViT-B/16"):
        with torch.device("meta"):
            assert published_name(clip(name).state_dict()) == name
    assert published_name(published()[2]) is None
    torch.save({name: torch.zeros(1).expand(v.shape) for name, v in shapes("ViT-B/16").items()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the file's shapes are those of 'ViT-B/16': build .* clip\('ViT-B/16'\)"):
        load_weights(tmp_path / "a.pt", small(), activation="quick_gelu")


def shapes(name):
    with torch.device("meta"):
        return clip(name).state_dict()


class Runs:
    def __reduce__(self):
        return (os.mkdir, ("evidence",))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Runs()}, tmp_path / "a.pt")
    (tmp_path / "b.bin").write_bytes(pickle.dumps(Runs(), 2))
    for file in ("a.pt", "b.bin"):
        with pytest.raises(
            ValueError, match=f"nothing but tensors, given .*{file}, which would run code .*mkdir.*safetensors"
        ):
            read_weights(tmp_path / file)
    assert not (tmp_path / "evidence").exists()
    pickle.loads((tmp_path / "b.bin").read_bytes())
    assert (tmp_path / "evidence").exists()  # so it is what the test takes it for


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.safetensors", b"x" * 100, "expected a safetensors file, given .*a.safetensors"),
        ("a.safetensors", b"", "expected a safetensors file, given .*a.safetensors"),
        ("a.pt", b"hello", "would run code or is damaged"),
        ("a.pt", b"", "nothing but tensors, given .*a.pt"),
        ("a.pt", b"PK\x03\x04" + b"x" * 99, "a.pt"),
    ],
)
def test_damaged_files_are_refused(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / file)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": [torch.ones(1)]}}, torch.ones(2)])
def test_files_without_a_state_dict_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"expected a state dict in .*a\.pt, or one under 'state_dict'"):
        read_weights(tmp_path / "a.pt")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of weights, given .*a\.pt.*correct the path"):
        read_weights(tmp_path / "a.pt")


def test_names_of_layouts_that_are_not_known(tmp_path):
    with pytest.raises(ValueError, match="layout to be one of 'published', 'hugging_face', given 'tf'"):
        save_weights(tmp_path / "a.safetensors", small(), layout="tf")
