"""Runs of k residues, as numbers."""

from __future__ import annotations

import numpy as np

from pipeline.systems.mimir.peptides import Peptides


def kmers(peptides: Peptides, k: int, letters: int) -> tuple[np.ndarray, np.ndarray]:
    """(peptide, number) of every run of k residues, both [runs] int64; the number is below letters^k, the first residue
    counting most. Peptides shorter than k have none."""
    width = peptides.letters.shape[1]
    places = max(0, width - k + 1)
    numbers = np.zeros((len(peptides), places), np.int64)
    for shift in range(k):
        numbers = numbers * letters + peptides.letters[:, shift : shift + places]
    within = np.arange(places) < peptides.lengths.astype(np.int64)[:, None] - k + 1
    owners = np.broadcast_to(np.arange(len(peptides))[:, None], within.shape)
    return owners[within], numbers[within]
