"""Which peptides are for training, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.data.sources.base import digest, hold_out_threshold

TRAINING, HELD_OUT, HELD_OUT_TARGET, LEFT_OUT = range(4)
"""What a row is for; a row that is left out is for nothing."""


def split(
    sequences: pa.StringArray, labels: np.ndarray, targets: np.ndarray, names: Sequence[str], holdout: float
) -> np.ndarray:
    """What each row is for [N] int8."""
    parts = np.full(len(labels), TRAINING, np.int8)
    if holdout <= 0:
        return parts
    hashes = np.array([digest("peptide", text) for text in sequences.to_pylist()], np.uint64)
    parts[hashes < np.uint64(hold_out_threshold(holdout))] = HELD_OUT
    present = np.unique(targets[targets >= 0]).tolist()
    if len(present) > 1:
        present.sort(key=lambda target: digest("target", names[target]))
        parts[np.isin(targets, present[: max(1, round(holdout * len(present)))])] = HELD_OUT_TARGET
    return parts
