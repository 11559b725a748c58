"""The loss of models that predict the next token."""

import math

import pytest
import torch

from gpipe.models.next_token import NextTokenLoss

loss = NextTokenLoss()


def test_a_mean_over_rows_of_means_over_tokens():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2, 3], [4, -100, -100, -100], [-100, 0, 1, -100]])
    rows = []
    for row, expected in zip(logits, targets, strict=True):
        nats = [-row[t].log_softmax(-1)[k].item() for t, k in enumerate(expected.tolist()) if k != -100]
        rows.append(sum(nats) / len(nats))
    assert loss(logits, targets).item() == pytest.approx(sum(rows) / 3, rel=1e-12)


def test_micro_batches_weighted_by_rows_give_the_whole():
    logits, targets = torch.randn(5, 4, 7, dtype=torch.float64), torch.randint(7, (5, 4))
    targets[1, 1:] = targets[3] = -100
    parts = [loss(logits[:2], targets[:2]) * 2 / 5, loss(logits[2:], targets[2:]) * 3 / 5]
    torch.testing.assert_close(sum(parts), loss(logits, targets), rtol=1e-12, atol=0)


def test_no_score_gives_the_logarithm_of_the_vocabulary():
    assert loss(torch.zeros(2, 3, 11), torch.ones(2, 3, dtype=torch.int64)).item() == pytest.approx(math.log(11))


def test_a_row_without_tokens_adds_nothing_and_is_counted():
    logits, targets = torch.randn(2, 3, 5, requires_grad=True), torch.tensor([[1, 2, 3], [-100] * 3])
    value = loss(logits, targets)
    torch.testing.assert_close(value, loss(logits[:1], targets[:1]) / 2)
    value.backward()
    assert not logits.grad[1].any()
    assert logits.grad[0].isfinite().all()


def test_low_precision_scores_are_compared_in_float32():
    logits, targets = torch.randn(2, 3, 5).bfloat16(), torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(loss(logits, targets), loss(logits.float(), targets))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ((2, 5), torch.zeros(2, dtype=torch.int64), r"logits of shape \(B, T, V\) .* given \(2, 5\) and \(2,\)"),
        ((2, 3, 5), torch.zeros(2, 4, dtype=torch.int64), r"given \(2, 3, 5\) and \(2, 4\); pass one target"),
        ((0, 3, 5), torch.zeros(0, 3, dtype=torch.int64), "neither B nor T 0"),
        ((2, 3, 5), torch.zeros(2, 3), r"dtype torch\.int64, given torch\.float32; convert"),
        ((2, 3, 5), torch.full((2, 3), 5), "targets from 0 to 4, .* or -100 for none, given 5; build"),
        ((2, 3, 5), torch.full((2, 3), -1), "given -1; build the model with the vocabulary_size"),
    ],
)
def test_what_does_not_fit_is_refused(logits, targets, message):
    with pytest.raises(ValueError, match=f"NextTokenLoss: expected .*{message}"):
        loss(torch.zeros(logits), targets)
