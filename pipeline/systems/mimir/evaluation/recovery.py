"""Whether a classifier that has seen the training data tells from a drawn peptide what it was drawn for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.systems.mimir.evaluation.estimates import Estimate, bootstrap
from pipeline.systems.mimir.evaluation.kmers import kmers
from pipeline.systems.mimir.peptides import Peptides

RUN = 3
"""Residues of the runs that the classifier counts."""
WEIGHTS = tuple(10.0**power for power in range(7))
"""Of the composition of all classes in that of one, in runs; the likeliest is taken."""
SHUFFLES = 1000


@dataclass(frozen=True)
class Recovery:
    """Of the classes that peptides were drawn for. recovered: the share that is recognised, the mean over classes.
    shuffled: the same of shuffled classes, on average, and `upper` is what 95 % of the shuffles do not reach."""

    recovered: Estimate
    shuffled: float
    upper: float


class KmerClassifier:
    """Naive Bayes over runs of residues: of each class a distribution of runs, smoothed towards that of all classes,
    all classes being as likely. How much it is smoothed is what makes the runs of the training data likeliest, each
    left out in turn."""

    def __init__(self, peptides: Peptides, classes: np.ndarray, letters: int, k: int = RUN) -> None:
        """classes [N] int64, 0 to the number of classes less one, each with a peptide."""
        self.letters, self.k = letters, k
        bins, count = letters**k, int(classes.max()) + 1
        owners, runs = kmers(peptides, k, letters)
        counts = np.bincount(classes[owners] * bins + runs, minlength=count * bins).reshape(count, bins).astype(float)
        everywhere = (counts.sum(0) + 1) / (counts.sum() + bins)
        totals = counts.sum(1, keepdims=True)
        self.weight = max(WEIGHTS, key=lambda weight: _left_out(counts, totals, everywhere, weight))
        self.log_shares = np.log((counts + self.weight * everywhere) / (totals + self.weight))
        """[classes, runs]."""

    def scores(self, peptides: Peptides) -> np.ndarray:
        """log p(runs | class), [N, classes]."""
        owners, runs = kmers(peptides, self.k, self.letters)
        found = np.zeros((len(peptides), len(self.log_shares)))
        for number, log_shares in enumerate(self.log_shares):
            found[:, number] = np.bincount(owners, log_shares[runs], len(peptides))
        return found


def _left_out(counts: np.ndarray, totals: np.ndarray, everywhere: np.ndarray, weight: float) -> float:
    """Log likelihood of every run given its class's other ones."""
    seen = counts > 0
    share = (counts - 1 + weight * everywhere) / np.maximum(totals - 1 + weight, 1e-300)
    return float((counts[seen] * np.log(share[seen])).sum())


def recovery(scores: np.ndarray, classes: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> Recovery:
    """Of scores [N, classes] and what the peptides were drawn for [N]. The interval is over groups [N] (None: over
    peptides)."""
    if not len(classes):
        return Recovery(Estimate.unknown(), np.nan, np.nan)
    said = scores.argmax(1)
    present = np.unique(classes)
    member = (classes[:, None] == present).astype(np.float64)

    def balanced(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return np.nanmean((weights * (said == classes)) @ member / (weights @ member), axis=1)

    generator = np.random.Generator(np.random.PCG64(seed))
    shares = []
    for _ in range(SHUFFLES):
        shuffled = generator.permutation(classes)
        right = np.bincount(np.searchsorted(present, shuffled), said == shuffled, len(present))
        shares.append(float((right / member.sum(0)).mean()))
    found = bootstrap(balanced, np.arange(len(classes)) if groups is None else groups, seed=seed)
    return Recovery(found, float(np.mean(shares)), float(np.quantile(shares, 0.95)))


def confusion(scores: np.ndarray, classes: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Shares of the peptides drawn for each of the classes `shown` [n] that are taken for each: [n, n], rows as drawn.
    A row need not sum to 1: others are not shown."""
    said = scores.argmax(1)
    return np.array(
        [[np.mean(said[classes == asked] == found) if (classes == asked).any() else np.nan for found in shown]
         for asked in shown]
    )  # fmt: skip
