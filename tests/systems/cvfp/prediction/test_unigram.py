"""The unigram model is that of the training tokens, one added to each count."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.systems.cvfp.prediction.unigram import unigram
from tests.systems.cvfp.prediction.naive import TRAINING, VOCAB, documents


def test_nats_are_of_add_one_counts_of_training_tokens_alone() -> None:
    found = documents()
    nats, likeliest = unigram(found)
    seen = [int(token) for index in range(TRAINING) for token in found.document(index)]
    counts = [seen.count(token) for token in range(VOCAB)]
    assert np.exp(-nats).tolist() == pytest.approx([(count + 1) / (len(seen) + VOCAB) for count in counts], rel=1e-12)
    assert np.exp(-nats).sum() == pytest.approx(1, rel=1e-12)
    assert counts[likeliest] == max(counts)
