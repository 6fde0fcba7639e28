"""The loss head gives what logits and a cross-entropy give."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipeline.data.batch import IGNORED
from pipeline.lm.loss_head import LossHead


def test_losses_and_predictions_are_those_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    head = LossHead(8, 11, bias=False, dtype=torch.float64)
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator)
    labels = torch.randint(11, (2, 5), generator=generator)
    labels[0, 3] = IGNORED
    logits = head(hidden)
    losses, predictions = head(hidden, labels, predict=True)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert losses[0, 3] == 0 and torch.equal(predictions, logits.argmax(-1))
    assert head(hidden, labels)[1] is None
