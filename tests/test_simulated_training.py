"""How often ``gpipe train`` waits for simulated devices: once a step, for the loss it checks before the update."""

import math

import pytest
import tiny_run
import torch

from gpipe.testing import accelerators
from gpipe.training.build import build, make_plan
from gpipe.training.checking import CheckedLoss, NonFiniteError
from gpipe.training.reading import read_configuration
from gpipe.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not accelerators.started(), reason="needs simulated accelerators")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trainer(folder, pipeline):
    """Of a language model with dropout on two devices, its loss micro-batch by micro-batch."""
    language_model = {"layers": 2, "width": 8, "heads": 2, "context_length": 16, "vocabulary_size": 256, "dropout": 0.1}
    file = tiny_run.write(
        folder,
        model={"factory": "gpipe.models.language_model.language_model", "arguments": language_model},
        loss={"factory": "gpipe.models.next_token.NextTokenLoss"},
        data={"name": "python_source", "context_length": 16},
        pipeline={"stages": 2, "chunks": 8, "loss_over": "micro_batch", "devices": ["sim:0", "sim:1"], **pipeline},
        training={"steps": 9, "batch_size": 8, "seed": 5, "save_every": 9, "clip_gradient_norm": 1.0},
    )
    return Trainer(build(make_plan(read_configuration(file), file)), folder / "saves")


SCHEDULES = [{"schedule": "one_f_one_b"}, {"schedule": "gpipe", "checkpoint": "always"}]


# The loss was looked at in the last stage: a wait for every micro-batch, and one for each recompute.
@pytest.mark.parametrize("pipeline", SCHEDULES, ids=["one_f_one_b", "recomputed"])
def test_a_step_of_gpipe_train_waits_once(tmp_path, pipeline):
    trained = trainer(tmp_path, pipeline)
    trained.train_step()
    for _ in range(2):
        accelerators.clear()
        trained.train_step()
        assert sum(accelerators.waits().values()) == 1, accelerators.waits()
        assert not accelerators.reports()


def test_a_micro_batch_whose_loss_is_no_number_leaves_the_weights(tmp_path, monkeypatch):
    trained = trainer(tmp_path, {"schedule": "one_f_one_b", "checkpoint": "never"})
    engine = trained._job.engine
    trained.train_step()
    before = {name: weight.clone() for name, weight in engine.weights().items()}
    given = engine._loss.loss
    calls = []

    def once(outputs, targets):
        calls.append(outputs)
        return given(outputs, targets) * (math.inf if len(calls) == 3 else 1.0)

    monkeypatch.setattr(engine, "_loss", CheckedLoss(once))
    with pytest.raises(NonFiniteError, match="step 2: the loss is inf"):
        trained.train_step()
    assert len(calls) == 8
    assert all(torch.equal(weight, before[name]) for name, weight in engine.weights().items())
