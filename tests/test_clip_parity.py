"""CLIP against OpenCLIP's models with the same random weights; ``pip install gpipe[parity]`` brings them."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F

from gpipe.models.clip import clip
from gpipe.models.clip_prompts import IMAGENET_TEMPLATES
from gpipe.models.clip_weights import load_weights, save_weights
from gpipe.models.contrastive import ContrastiveLoss, SigmoidLoss

with warnings.catch_warnings():  # its own imports may warn
    warnings.simplefilter("ignore")
    open_clip = pytest.importorskip(
        "open_clip", reason="open_clip_torch cannot be imported: pip install gpipe[parity]", exc_type=ImportError
    )

pytestmark = pytest.mark.slow

NAMES = {"ViT-B/32": "ViT-B-32-quickgelu", "ViT-L/14": "ViT-L-14-quickgelu", "RN50": "RN50-quickgelu"}


@pytest.fixture(scope="module", params=NAMES)
def models(request):
    """Theirs with random weights, ours with the same."""
    logging.disable(logging.WARNING)  # that nothing is downloaded
    torch.manual_seed(0)
    theirs = open_clip.create_model(NAMES[request.param], pretrained=None).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith(("bias", "running_mean")):  # which start as zeros
                tensor.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var") or ".bn3.weight" in name:
                tensor.uniform_(0.2, 1, generator=generator)
    logging.disable(logging.NOTSET)
    ours, loss = clip(request.param).eval(), ContrastiveLoss()
    state = theirs.state_dict()
    loss.load_state_dict({"logit_scale": state.pop("logit_scale")})
    ours.load_state_dict(state, strict=True)
    return theirs, ours, loss


def inputs(model):
    generator = torch.Generator().manual_seed(2)
    side = model.visual.image_size
    images = torch.randn(2, 3, side, side, generator=generator)
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    end = torch.tensor([5, 76])
    for row, last in zip(tokens, end.tolist(), strict=True):
        row[:last] = torch.randint(1, 49406, (last,), generator=generator)
        row[0], row[last] = 49406, 49407  # start and end, the largest id, by which theirs finds it
    return images, tokens, end


@torch.inference_mode()
def test_images_texts_and_logits_are_those_of_open_clip(models):
    theirs, ours, loss = models
    images, tokens, end = inputs(ours)
    expected = theirs.encode_image(images), theirs.encode_text(tokens)
    found = ours((images, tokens, end))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())
        torch.testing.assert_close(F.normalize(one, dim=-1), F.normalize(other, dim=-1), rtol=0, atol=1e-5)
    their_logits, _ = theirs.get_logits(images, tokens)
    logits = loss.logit_scale.exp() * F.normalize(found[0], dim=-1) @ F.normalize(found[1], dim=-1).T
    torch.testing.assert_close(logits, their_logits, rtol=0, atol=1e-5)


def test_weights_load_strictly_in_both_directions(models, tmp_path):
    theirs, ours, loss = models
    theirs.load_state_dict(ours.state_dict() | loss.state_dict(), strict=True)
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "a.pt"
    )
    load_weights(tmp_path / "a.pt", ours, loss, activation="quick_gelu")
    save_weights(tmp_path / "b.safetensors", ours, loss)
    open_clip.load_checkpoint(theirs, str(tmp_path / "b.safetensors"), strict=True)


def test_the_losses_are_those_of_open_clip():
    generator = torch.Generator().manual_seed(3)
    images, texts = F.normalize(torch.randn(2, 9, 8, generator=generator), dim=-1)
    loss = ContrastiveLoss(chunk=4)
    expected = open_clip.loss.ClipLoss()(images, texts, loss.logit_scale.exp())
    torch.testing.assert_close(loss((images, texts)), expected)
    loss = SigmoidLoss(chunk=4)
    expected = open_clip.loss.SigLipLoss()(images, texts, loss.logit_scale.exp(), loss.logit_bias)
    torch.testing.assert_close(loss((images, texts)), expected)


def test_the_published_prompts_are_those_of_open_clip():
    assert [template.replace("{}", "cat") for template in IMAGENET_TEMPLATES] == [
        template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]
