"""The loss of a classifier that may have an auxiliary head."""

import torch.nn.functional as F
from torch import Tensor, nn

from gpipe.models.settings import require_probability


class ClassificationLoss(nn.Module):
    """Cross-entropy of the logits, and a share of that of the auxiliary logits where there are some.

    A mean over rows, so it is the same over micro-batches as over the mini-batch.

    Args:
        auxiliary_weight: the share, at least 0; 0.4 in AmoebaNet's and Inception's training.
        label_smoothing: share of every target that is spread evenly over all classes.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, auxiliary_weight: float = 0.4, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not auxiliary_weight >= 0:
            raise ValueError(
                f"expected auxiliary_weight to be at least 0, given {auxiliary_weight!r}; "
                "set it to 0.0 to leave the auxiliary head untrained"
            )
        require_probability("label_smoothing", label_smoothing)
        self.auxiliary_weight = auxiliary_weight
        self.label_smoothing = label_smoothing

    def forward(self, outputs: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """The mean loss in nats.

        Args:
            outputs: logits (B, classes), or (logits, auxiliary logits), both (B, classes).
            targets: (B,) int64, or (B, classes) probabilities.
        """
        if isinstance(outputs, Tensor):
            return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)
        logits, auxiliary = outputs
        return self(logits, targets) + self.auxiliary_weight * self(auxiliary, targets)  # type: ignore[no-any-return]
