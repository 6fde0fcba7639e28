"""Whether the likelihood of a peptide under its target exceeds that under others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.systems.mimir.evaluation.estimates import Estimate, bootstrap, mean


@dataclass(frozen=True)
class Ranking:
    """Of log likelihood ratios of peptides under targets against no target.

    auroc: probability that a true pair of peptide and target has a higher ratio than a decoy, over all pairs.
    within: the same among the targets of one peptide, on average. first: how often the true target is the first of all
    of a peptide's; `chance` is what a guess has of it, on average. Of peptides with one decoy at least.
    """

    auroc: Estimate
    within: Estimate
    first: Estimate
    chance: float


def rank(ratios: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> Ranking:
    """Of ratios [N, 1 + decoys], the true target's first, NaN for a decoy that a peptide lacks. Intervals are over
    groups [N] of peptides, such as those of a target (None: over peptides)."""
    groups = np.arange(len(ratios)) if groups is None else groups
    ranked = ~np.isnan(ratios[:, 1:]).all(1)
    if not ranked.any():
        return Ranking(Estimate.unknown(), Estimate.unknown(), Estimate.unknown(), np.nan)
    ratios, groups = ratios[ranked], groups[ranked]
    true, decoys = ratios[:, :1], ratios[:, 1:]
    above = np.where(np.isnan(decoys), 0.0, (true > decoys) + 0.5 * (true == decoys))
    candidates = (~np.isnan(ratios)).sum(1)
    best = ratios == np.nanmax(ratios, 1, keepdims=True)
    # Of several that are equally likely a guess among them is the first.
    first = best[:, 0] / best.sum(1)
    within = mean(above.sum(1) / (candidates - 1), groups, seed=seed)
    chance = float((1 / candidates).mean())
    return Ranking(_pooled(ratios, groups, seed), within, mean(first, groups, seed=seed), chance)


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that one of `positive` [P] is above one of `negative` [N]; ties count one half."""
    scores, places = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    weights = np.zeros((1, len(scores), 2))
    np.add.at(weights[0, :, 0], places[: len(positive)], 1.0)
    np.add.at(weights[0, :, 1], places[len(positive) :], 1.0)
    return float(_area(weights)[0])


def roc(ratios: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """The share of true targets above the threshold that lets through the shares `rates` [R] of decoys, which are NaN
    where a peptide lacks one: [R]."""
    every = ratios[:, 1:][~np.isnan(ratios[:, 1:])]
    true, decoys = np.sort(ratios[:, 0])[::-1], np.sort(every)[::-1]
    thresholds = np.unique(np.concatenate([true, decoys]))[::-1]
    passed = np.searchsorted(-decoys, -thresholds, side="right") / len(decoys)
    found = np.searchsorted(-true, -thresholds, side="right") / len(true)
    return np.interp(rates, np.concatenate([[0.0], passed]), np.concatenate([[0.0], found]))


def _pooled(ratios: np.ndarray, groups: np.ndarray, seed: int) -> Estimate:
    scores, places = np.unique(ratios, return_inverse=True)
    places = places.reshape(ratios.shape)
    there = ~np.isnan(ratios[:, 1:])
    decoys = np.broadcast_to(np.arange(len(ratios))[:, None], there.shape)[there]

    def statistic(weights: np.ndarray) -> np.ndarray:
        binned = np.zeros((len(weights), len(scores), 2))
        for row, weight in zip(binned, weights, strict=True):
            row[:, 0] = np.bincount(places[:, 0], weight, len(scores))
            row[:, 1] = np.bincount(places[:, 1:][there], weight[decoys], len(scores))
        return _area(binned)

    return bootstrap(statistic, groups, seed=seed)


def _area(weights: np.ndarray) -> np.ndarray:
    """[resamples] of the weights [resamples, scores, 2] of positives and negatives at each score, ascending."""
    positive, negative = weights[..., 0], weights[..., 1]
    below = negative.cumsum(1) - 0.5 * negative
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))
