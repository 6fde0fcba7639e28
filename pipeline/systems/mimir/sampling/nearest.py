"""How far new peptides are from those of the training data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.errors import UserError

BLOCK = 1 << 24
"""Distances that are held at a time."""


def nearest(peptides: Sequence[str], known: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(edits [N] int64, index [N] int64): the Levenshtein distance of each peptide to the nearest of `known`, of which
    there is one at least, and which that is, of equals the first. Raises UserError without rapidfuzz."""
    try:
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist
    except ModuleNotFoundError:
        raise UserError(
            "the nearest training peptide is found with rapidfuzz: pip install -e '.[mimir]', or give --no-novelty"
        ) from None
    edits = np.full(len(peptides), np.iinfo(np.int64).max)
    index = np.zeros(len(peptides), np.int64)
    step = max(1, BLOCK // max(1, len(peptides)))
    for start in range(0, len(known), step):
        # Bytes hold the distances of peptides, whose lengths do too.
        found = cdist(peptides, known[start : start + step], scorer=Levenshtein.distance, dtype=np.uint8)
        place = found.argmin(1)
        least = found[np.arange(len(peptides)), place].astype(np.int64)
        nearer = least < edits
        edits[nearer], index[nearer] = least[nearer], start + place[nearer]
    return edits, index
