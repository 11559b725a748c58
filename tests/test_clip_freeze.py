"""Frozen towers: no gradient, no optimizer state, batch norm in eval mode, alone and under a pipeline."""

import pytest
import torch
import yaml
from nets import make_pipe
from test_clip import small
from test_clip_resnet import batch, tiny
from tiny_run import TINY

from gpipe.models.contrastive import ContrastiveLoss
from gpipe.training.build import build, make_plan
from gpipe.training.reading import read_configuration
from gpipe.training.trainer import Trainer

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
    values = yaml.safe_load(yaml.safe_dump(TINY)) | {"output": str(tmp_path / "run")}
    values["model"]["arguments"]["freeze"] = "image"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    job = build(make_plan(read_configuration(tmp_path / "run.yaml", ()), tmp_path / "run.yaml"))
    model = vars(job.pipe)["module"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(job)
    trainer.train_step()
    saved = trainer.save()["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in saved) == len(of(model, "text")) + 1  # the loss's temperature
    assert all(torch.equal(before[name], p) for name, p in of(model, "image").items())
    assert not any(torch.equal(before[name], p) for name, p in of(model, "text").items() if "resblocks" in name)


def test_other_towers_are_refused():
    with pytest.raises(ValueError, match="freeze to be one of 'image', 'text', given 'vision'"):
        small(freeze="vision")
