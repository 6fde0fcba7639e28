"""The loss head gives what logits and a cross-entropy give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pipeline.data.batch import IGNORED
from pipeline.lm.loss_head import LossHead


@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_predictions_are_those_of_the_logits(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    head = LossHead(8, 11, bias=bias, dtype=torch.float64)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(11, (2, 5), generator=generator)
    labels[0, 3] = IGNORED
    logits = head(hidden)
    losses, predictions = head(hidden, labels, predict=True)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses[0, 3] == 0 and torch.equal(predictions, logits.argmax(-1))
    assert head(hidden, labels)[1] is None
    with_z = head(hidden, labels, z_loss=0.1)
    torch.testing.assert_close(with_z[0], expected)
    torch.testing.assert_close(with_z[2], 0.1 * logits.logsumexp(-1).square() * (labels != IGNORED))


def test_a_head_with_a_bias_takes_no_teacher() -> None:
    head, hidden = LossHead(8, 11), torch.randn(3, 8)
    with pytest.raises(ValueError, match="without bias"):
        head(hidden, teacher=hidden)
