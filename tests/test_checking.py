import torch
from torch import nn

from gpipe.training.checking import CheckedLoss


class Own(nn.Module):
    """A loss with parameters, a buffer, state of its own and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.inner = nn.BatchNorm1d(2)
        self.seen = 0
        self.register_forward_hook(lambda *_: setattr(self, "seen", self.seen + 1))

    def forward(self, outputs: torch.Tensor, targets: object) -> torch.Tensor:
        return self.scale * outputs.sum()

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state


def test_a_checked_loss_is_saved_under_the_losss_own_names() -> None:
    loss = Own()
    checked = CheckedLoss(loss)
    assert dict(checked.named_parameters()).keys() == dict(loss.named_parameters()).keys()
    assert checked.scale is loss.scale
    assert checked.state_dict().keys() == loss.state_dict().keys()
    other = Own()
    state = loss.state_dict() | {"scale": torch.tensor(3.0), "_extra_state": 7}
    CheckedLoss(other).load_state_dict(state)
    assert other.scale.item() == 3.0
    assert other.seen == 7


def test_a_checked_loss_runs_the_losss_hooks_once() -> None:
    loss = Own()
    CheckedLoss(loss)(torch.ones(2), None)
    assert loss.seen == 1


def test_a_checked_loss_has_the_losss_mode() -> None:
    loss = Own()
    CheckedLoss(loss).eval()
    assert not loss.training
    assert not loss.inner.training


def test_a_function_is_a_loss_without_state() -> None:
    checked = CheckedLoss(lambda outputs, targets: outputs.sum())
    checked.load_state_dict(checked.state_dict())
    assert not list(checked.parameters())
    assert checked(torch.ones(3), None).item() == 3.0
