"""The names CLIP's weights have elsewhere: Hugging Face's layout from and to the published one.

Hugging Face splits the input projection of attention in three and keeps the two last projections transposed. Its
``position_ids`` count from 0 and are no weights.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

# Published prefix, prefix there, of what both sides hold as it is.
_ONE_TO_ONE = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ("ln_final.bias", "text_model.final_layer_norm.bias"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.weight", "vision_model.pre_layrnorm.weight"),  # spelt so there
    ("visual.ln_pre.bias", "vision_model.pre_layrnorm.bias"),
    ("visual.ln_post.weight", "vision_model.post_layernorm.weight"),
    ("visual.ln_post.bias", "vision_model.post_layernorm.bias"),
)
_TRANSPOSED = (("text_projection", "text_projection.weight"), ("visual.proj", "visual_projection.weight"))
_TOWERS = (
    ("transformer.resblocks", "text_model.encoder.layers"),
    ("visual.transformer.resblocks", "vision_model.encoder.layers"),
)
_IN_BLOCK = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)
_QKV = ("q_proj", "k_proj", "v_proj")


def is_hugging_face(weights: Mapping[str, Tensor]) -> bool:
    """Whether names are those of Hugging Face's layout."""
    return any(name.startswith(("text_model.", "vision_model.")) for name in weights)


def from_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their published names; those of no such layout keep the names they have.

    Args:
        weights: by Hugging Face's names. ``position_ids`` are left out.
    """
    rest = {name: weight for name, weight in weights.items() if not name.endswith("embeddings.position_ids")}
    found = {ours: rest.pop(theirs) for ours, theirs in _ONE_TO_ONE if theirs in rest}
    found |= {ours: rest.pop(theirs).T for ours, theirs in _TRANSPOSED if theirs in rest}
    for ours, theirs in _TOWERS:
        for number in _numbers(rest, theirs):
            found |= _block_from(rest, f"{ours}.{number}", f"{theirs}.{number}")
    return found | rest


def _numbers(names: Iterable[str], prefix: str) -> list[str]:
    """What stands between a prefix and the next dot, of names such as ``prefix.0.ln_1.weight``; each once."""
    return list(dict.fromkeys(name[len(prefix) + 1 :].split(".")[0] for name in names if name.startswith(f"{prefix}.")))


def _block_from(rest: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """One block's weights, taken out of ``rest``."""
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        parts = [f"{theirs}.self_attn.{part}.{kind}" for part in _QKV]
        if all(part in rest for part in parts):
            found[f"{ours}.attn.in_proj_{kind}"] = torch.cat([rest.pop(part) for part in parts])
        for our_part, their_part in _IN_BLOCK:
            if (name := f"{theirs}.{their_part}.{kind}") in rest:
                found[f"{ours}.{our_part}.{kind}"] = rest.pop(name)
    return found


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names.

    Args:
        weights: by their published names, of a CLIP with a Vision Transformer.

    Raises:
        ValueError: there are weights that have no name there, as those of a ResNet.
    """
    rest = dict(weights)
    found = {theirs: rest.pop(ours) for ours, theirs in _ONE_TO_ONE if ours in rest}
    found |= {theirs: rest.pop(ours).T.contiguous() for ours, theirs in _TRANSPOSED if ours in rest}
    for ours, theirs in _TOWERS:
        for number in _numbers(rest, ours):
            found |= _block_to(rest, f"{ours}.{number}", f"{theirs}.{number}")
    if "logit_scale" in rest:
        found["logit_scale"] = rest.pop("logit_scale")
    if rest:
        raise ValueError(
            f"expected the weights of a CLIP with a Vision Transformer, given {len(rest)} that Hugging Face's layout "
            f"has no name for, such as {min(rest)}; save them in the published layout"
        )
    return found


def _block_to(rest: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """One block's weights, taken out of ``rest``."""
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        if (name := f"{ours}.attn.in_proj_{kind}") in rest:
            parts = rest.pop(name).chunk(3)
            found |= {f"{theirs}.self_attn.{at}.{kind}": part.clone() for at, part in zip(_QKV, parts, strict=True)}
        for our_part, their_part in _IN_BLOCK:
            if (name := f"{ours}.{our_part}.{kind}") in rest:
                found[f"{theirs}.{their_part}.{kind}"] = rest.pop(name)
    return found
