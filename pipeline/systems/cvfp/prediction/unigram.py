"""What a model knows that reads nothing: how often each token is."""

from __future__ import annotations

import numpy as np

from pipeline.systems.cvfp.documents import DocumentSet


def unigram(documents: DocumentSet) -> tuple[np.ndarray, int]:
    """Nats of each token [vocab] float64 by add-one counts of the training tokens, and the likeliest token."""
    training = documents.tokens[: documents.ends[documents.training - 1]]
    counts = np.bincount(training, minlength=documents.vocab).astype(np.float64) + 1
    return np.log(counts.sum()) - np.log(counts), int(counts.argmax())
