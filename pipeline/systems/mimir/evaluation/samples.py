"""What can be said of drawn peptides one by one: whether they are possible, new, and different from each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from pipeline.systems.mimir.evaluation.estimates import Estimate, mean, share

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
"""The 20 that the standard genetic code has. B, X and Z stand for residues that are not known, and selenocysteine (U)
needs more than a codon: a peptide with one of them cannot be ordered as it stands."""


def validity(sequences: Sequence[str], shortest: int, longest: int, letters: str = AMINO_ACIDS) -> Estimate:
    """The share of sequences of shortest to longest residues, all of `letters`."""
    allowed = set(letters)
    return share(np.array([shortest <= len(text) <= longest and allowed.issuperset(text) for text in sequences], bool))


def uniqueness(sequences: Sequence[str]) -> float:
    """Different sequences by sequences; NaN of none. It falls with their number, so compare it at equal ones."""
    return len(set(sequences)) / len(sequences) if len(sequences) else np.nan


def uniqueness_by_count(sequences: Sequence[str], counts: Sequence[int]) -> list[float]:
    """`uniqueness` of the first so many sequences."""
    return [uniqueness(sequences[:count]) for count in counts]


def novelty(sequences: Sequence[str], known: Collection[str]) -> Estimate:
    """The share of the different sequences that are none of those `known`, a set."""
    return share(np.array([text not in known for text in dict.fromkeys(sequences)], bool))


def diversity(sequences: Sequence[str], *, pairs: int = 2000, seed: int = 0) -> Estimate:
    """The mean edit distance between two of the sequences by the length of the longer one, 0 (all alike) to 1, of
    random pairs. Raises ModuleNotFoundError without rapidfuzz."""
    from rapidfuzz.distance import Levenshtein

    count = len(sequences)
    if count < 2:
        return Estimate.unknown()
    generator = np.random.Generator(np.random.PCG64(seed))
    first = generator.integers(0, count, pairs)
    second = (first + generator.integers(1, count, pairs)) % count
    found = [Levenshtein.normalized_distance(sequences[i], sequences[j]) for i, j in zip(first, second, strict=True)]
    return mean(np.array(found), seed=seed)
