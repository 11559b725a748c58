import math

import pytest
import torch
from torch import nn

from gpipe.training.config import ConstantSchedule, DecaySchedule, OptimizerConfig
from gpipe.training.factory import FactoryError
from gpipe.training.optimizer import build_optimizer, learning_rate_factor, optimizer_class, set_learning_rate


def config(name: str, **arguments: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"name": name, **arguments})


def parameters() -> list[tuple[str, nn.Parameter]]:
    shapes = {"matrix": (2, 3), "bias": (3,), "scalar": (), "image": (1, 1, 2, 2)}
    named = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    named["frozen"] = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    return list(named.items())


def decays(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}


def test_matrices_alone_decay() -> None:
    optimizer = build_optimizer(config("AdamW", weight_decay=0.2), parameters())
    assert decays(optimizer) == {"matrix": 0.2, "image": 0.2, "bias": 0.0, "scalar": 0.0}


def test_the_decay_an_optimizer_has_by_itself_spares_vectors_too() -> None:
    assert decays(build_optimizer(config("AdamW"), parameters()))["bias"] == 0.0
    assert decays(build_optimizer(config("AdamW"), parameters()))["matrix"] == 0.01


def test_all_parameters_decay_if_asked() -> None:
    optimizer = build_optimizer(config("SGD", lr=1.0, weight_decay=0.5, decay_matrices_only=False), parameters())
    assert decays(optimizer) == {"matrix": 0.5, "bias": 0.5, "scalar": 0.5, "image": 0.5}


def test_arguments_reach_the_optimizer() -> None:
    optimizer = build_optimizer(config("Adam", lr=0.5, betas=[0.5, 0.6], amsgrad=True), parameters())
    assert optimizer.defaults["betas"] == (0.5, 0.6)
    assert optimizer.param_groups[1]["amsgrad"] is True


def test_an_optimizer_without_weight_decay() -> None:
    assert len(build_optimizer(config("Rprop"), parameters()).param_groups) == 1


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (config("SparseAdam"), r"^optimizer.name: should be one of (?!.*SparseAdam,).*, given 'SparseAdam'"),
        (config("SGD", differentiable=True), r"^optimizer.differentiable: .* outside autograd's graph: leave it out$"),
    ],
)
def test_optimizers_that_cannot_step_here_are_refused(refused: OptimizerConfig, told: str) -> None:
    with pytest.raises(FactoryError, match=told):
        optimizer_class(refused)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(FactoryError, match=r"neither the model nor the loss has a parameter to train"):
        build_optimizer(config("SGD"), parameters()[-1:])


def test_parameters_that_an_optimizer_cannot_train() -> None:
    with pytest.raises(FactoryError, match=r"^optimizer: Muon refuses the parameters: "):
        build_optimizer(config("Muon"), parameters())


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (ConstantSchedule(), [1.0] * 6),
        (ConstantSchedule(warmup_steps=4), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
        (DecaySchedule(name="linear", warmup_steps=2), [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (DecaySchedule(name="linear", warmup_steps=2, final_share=0.2), [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]),
        (DecaySchedule(name="linear", decay_steps=2), [1.0, 0.5, 0.0, 0.0, 0.0, 0.0]),
        (DecaySchedule(name="cosine"), [(1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]),
        (DecaySchedule(name="cosine", warmup_steps=9), [(i + 1) / 9 for i in range(6)]),
        (DecaySchedule(name="cosine", decay_steps=1, final_share=0.1), [1.0] + [0.1] * 5),
    ],
)
def test_learning_rates(schedule: ConstantSchedule | DecaySchedule, rates: list[float]) -> None:
    assert [learning_rate_factor(schedule, step, 6) for step in range(6)] == pytest.approx(rates)


def test_every_group_gets_the_rate() -> None:
    optimizer = build_optimizer(config("SGD", lr=0.5), parameters())
    assert set_learning_rate(optimizer, 0.5) == 0.25
    assert set_learning_rate(optimizer, 0.1) == 0.05, "a share of the full rate, not of the last one"
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
