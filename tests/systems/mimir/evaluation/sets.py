"""Peptides by their text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.systems.mimir.peptides import Peptides

LETTERS = "ABCD"


def peptides(texts: Sequence[str], letters: str = LETTERS, width: int = 8) -> Peptides:
    """Background peptides of these letters."""
    ids = np.zeros((len(texts), width), np.uint8)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = [letters.index(letter) for letter in text]
    lengths = np.array([len(text) for text in texts], np.uint8)
    return Peptides(ids, lengths, np.zeros(len(texts), np.int8), np.full(len(texts), -1, np.int32))


def independent(
    generator: np.random.Generator, count: int, shares: Sequence[float] = (0.25,) * 4, width: int = 8, shortest: int = 4
) -> Peptides:
    """Peptides of independent residues and evenly drawn lengths."""
    lengths = generator.integers(shortest, width + 1, count).astype(np.uint8)
    ids = generator.choice(len(shares), (count, width), p=shares).astype(np.uint8)
    ids[np.arange(width) >= lengths[:, None]] = 0
    return Peptides(ids, lengths, np.zeros(count, np.int8), np.full(count, -1, np.int32))
