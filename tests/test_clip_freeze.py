"""Frozen towers: no gradient, no optimizer state, batch norm in eval mode, alone and under a pipeline."""

import copy

import pytest
import torch
from nets import make_pipe
from safetensors.torch import load_file
from test_clip import small
from test_clip_resnet import batch, tiny
from tiny_run import TINY, run, write

from gpipe.models.contrastive import ContrastiveLoss
from gpipe.training.build import build, build_model, make_plan
from gpipe.training.reading import read_configuration

IMAGE = ("visual.",)
TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")


def of(model, tower):
    return {name: p for name, p in model.named_parameters() if name.startswith(IMAGE if tower == "image" else TEXT)}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_asks_for_no_gradient_and_the_other_does(tower):
    model = tiny(freeze=tower)
    other = "text" if tower == "image" else "image"
    assert of(model, "image").keys() | of(model, "text").keys() == dict(model.named_parameters()).keys()
    assert not any(p.requires_grad for p in of(model, tower).values())
    assert all(p.requires_grad for p in of(model, other).values())
    ContrastiveLoss()(model(batch())).backward()
    assert all(p.grad is None for p in of(model, tower).values())
    assert all(p.grad is not None for p in of(model, other).values())


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("balance", [[12], [5, 7], [3, 4, 5]], ids=str)
def test_training_in_a_pipe_leaves_a_frozen_tower_to_the_bit(balance, deferred):
    model, loss = tiny(freeze="image", dropout=0.2), ContrastiveLoss()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pipe = make_pipe(model, balance, deferred_batch_norm=deferred)
    optimizer = torch.optim.Adam([*pipe.parameters(), *loss.parameters()], lr=0.01)
    for mode in (True, False, True):  # what a loop does around an evaluation
        pipe.train(mode)
        assert not any(m.training for m in model.visual.modules())
        assert model.transformer.training is mode
    for _ in range(2):
        optimizer.zero_grad()
        loss(pipe(batch())).backward()
        optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == of(model, "text").keys()
    assert not {p for p in of(model, "image").values()} & set(optimizer.state)
    assert set(of(model, "text").values()) < set(optimizer.state)


def test_features_of_a_frozen_tower_do_not_depend_on_the_mode_or_the_micro_batches():
    model = tiny(freeze="image")
    alone = model.eval().encode_image(batch()[0])
    model.train()
    assert torch.equal(model.encode_image(batch()[0]), alone)
    pipe = make_pipe(model, [5, 7]).train()
    torch.testing.assert_close(pipe(batch())[0], alone)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_drops_nothing(tower):
    model = small(dropout=0.5, freeze=tower).train()
    images, tokens, end = torch.randn(2, 3, 8, 8), torch.zeros(2, 7).long(), torch.tensor([3, 4])
    image = [model.encode_image(images) for _ in range(2)]
    text = [model.encode_text(tokens, end) for _ in range(2)]
    assert torch.equal(*image) is (tower == "image")
    assert torch.equal(*text) is (tower == "text")


def test_freezing_later_is_the_same():
    model = tiny()
    model.freeze("image")
    model.train()
    assert not any(cell.training for cell in model.cells()[:7])
    assert all(cell.training for cell in model.cells()[7:])
    assert not model.visual.bn1.training
    model.cells()[0].train()
    assert not model.visual.bn1.training


def test_the_command_line_trains_the_other_tower_alone(tmp_path):
    model = copy.deepcopy(TINY["model"])
    model["arguments"]["freeze"] = "image"
    file = write(tmp_path, model=model)
    plan = make_plan(read_configuration(file), file)
    before = build_model(plan)
    told = run(file)
    assert "trained 12 steps" in told
    after = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(before.state_dict()[name], after[name]) for name in of(before, "image"))
    assert not any(torch.equal(before.state_dict()[name], after[name]) for name in of(before, "text"))
    trained = build(plan).engine.optimizer.param_groups
    assert sum(len(group["params"]) for group in trained) == len(of(before, "text")) + 1  # the loss's temperature


def test_other_towers_are_refused():
    with pytest.raises(ValueError, match="freeze to be one of 'image', 'text', given 'vision'"):
        small(freeze="vision")
