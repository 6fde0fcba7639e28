"""How far two sets of peptides are apart in residues, k-mers and lengths, beside what chance alone makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.systems.mimir.evaluation.kmers import kmers
from pipeline.systems.mimir.peptides import Peptides

PERMUTATIONS = 200
FIRST, SECOND, NEITHER = range(3)
"""Where a peptide is in a permutation."""


@dataclass(frozen=True)
class Distance:
    """Between two samples of peptides. Finite samples of one distribution are apart as well: by `expected` on average,
    and by less than `upper` in 95 % of all cases. `excess` is what no chance explains."""

    value: float
    expected: float
    upper: float

    @property
    def excess(self) -> float:
        return self.value - self.expected


def composition_distance(
    a: Peptides, b: Peptides, letters: int, groups: np.ndarray | None = None, *, seed: int = 0
) -> Distance:
    """Total variation between the shares of the residues; `groups` as in `kmer_distance`."""
    return kmer_distance(a, b, 1, letters, groups, seed=seed)


def kmer_distance(
    a: Peptides, b: Peptides, k: int, letters: int, groups: np.ndarray | None = None, *, seed: int = 0
) -> Distance:
    """Total variation between the shares of the runs of k residues, half the sum of their absolute differences: 0 for
    equal shares, 1 for disjoint ones. `groups`: which peptides of b belong together (None: each stands for itself)."""
    first, second = kmers(a, k, letters), kmers(b, k, letters)
    owners = np.concatenate([first[0], second[0] + len(a)])
    return _distance(owners, np.concatenate([first[1], second[1]]), len(a), len(b), groups, total_variation, seed)


def length_distance(a: Peptides, b: Peptides, groups: np.ndarray | None = None, *, seed: int = 0) -> Distance:
    """Wasserstein distance between the lengths, in residues: by how many of them a peptide must be longer or shorter,
    on average, for one distribution to become the other. `groups` as in `kmer_distance`."""
    values = np.concatenate([a.lengths, b.lengths]).astype(np.int64)
    return _distance(np.arange(len(values)), values, len(a), len(b), groups, wasserstein, seed)


def total_variation(p: np.ndarray, q: np.ndarray) -> float:
    """Of two distributions [bins]."""
    return float(np.abs(p - q).sum() / 2)


def wasserstein(p: np.ndarray, q: np.ndarray) -> float:
    """Of two distributions [bins] over numbers 0, 1, ..."""
    return float(np.abs((p - q).cumsum()).sum())


def _distance(
    owners: np.ndarray,
    bins: np.ndarray,
    count: int,
    other: int,
    groups: np.ndarray | None,
    between: Callable[[np.ndarray, np.ndarray], float],
    seed: int,
) -> Distance:
    """owners [values]: 0..count-1 of one sample, then those of the other one, whose groups are given; bins [values]:
    what was seen of it. Whole groups change sides in a permutation, each of the first sample's peptides being one: the
    residues of a peptide are no independent draws, nor are the peptides of a group. Of a group that has twice as many
    as the first sample or more, the first side takes as many as it has place for, and the others are on neither."""
    _, bins = np.unique(bins, return_inverse=True) if between is total_variation else (None, bins)
    generator = np.random.Generator(np.random.PCG64(seed))

    def of(side: np.ndarray) -> float:
        sides = side[owners]
        size = int(bins.max(initial=0)) + 1
        p, q = (np.bincount(bins[sides == which], minlength=size) for which in (FIRST, SECOND))
        return between(p / p.sum(), q / q.sum()) if p.sum() and q.sum() else np.nan

    _, member = np.unique(np.arange(other) if groups is None else groups, return_inverse=True)
    member = np.concatenate([np.arange(count), count + member])
    sizes = np.bincount(member)
    large = sizes >= 2 * count
    fitting = np.where(large, count, sizes)

    def permuted() -> np.ndarray:
        """The side of each peptide: as many on each as there are, as nearly as whole groups make them."""
        order = generator.permutation(len(sizes))
        first = np.empty(len(sizes), bool)
        first[order] = fitting[order].cumsum() - fitting[order] / 2 < count
        side = np.where(first, FIRST, SECOND)[member]
        for group in np.flatnonzero(large & first):
            side[generator.permutation(np.flatnonzero(member == group))[count:]] = NEITHER
        return side

    observed = np.where(np.arange(count + other) < count, FIRST, SECOND)
    by_chance = [of(permuted()) for _ in range(PERMUTATIONS)]
    return Distance(of(observed), float(np.mean(by_chance)), float(np.quantile(by_chance, 0.95)))
