"""Numbers with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.lm.binomial import wilson

RESAMPLES = 1000
ENDS = (0.025, 0.975)
_BLOCK = 64


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval; NaN where there is nothing to estimate it from."""

    value: float
    low: float
    high: float

    @classmethod
    def unknown(cls) -> Estimate:
        return cls(np.nan, np.nan, np.nan)


def share(right: np.ndarray) -> Estimate:
    """The share of true among `right` [N] bool, with Wilson's interval; NaN of none."""
    if not len(right):
        return Estimate.unknown()
    low, high = wilson(float(right.sum()), len(right))
    return Estimate(float(right.mean()), low, high)


def resampled(groups: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Iterator[np.ndarray]:
    """How often each item is drawn when whole groups are drawn with replacement, some resamples at a time:
    [resamples, N] float64. groups [N]: which items belong together; `np.arange(N)` where each stands for itself."""
    generator = np.random.Generator(np.random.PCG64(seed))
    names, member = np.unique(groups, return_inverse=True)
    for start in range(0, resamples, _BLOCK):
        size, number = min(_BLOCK, resamples - start), len(names)
        drawn = generator.integers(0, number, (size, number)) + np.arange(size)[:, None] * number
        times = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number)
        yield times[:, member].astype(np.float64)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """A statistic and its percentile interval over resampled groups (Efron 1979).

    statistic([resamples, N] weights) gives [resamples] values; weights of 1 are the data themselves. With fewer than
    two groups nothing says how much the value varies, and the ends are NaN.
    """
    if not len(groups):
        return Estimate.unknown()
    value = float(statistic(np.ones((1, len(groups))))[0])
    if len(np.unique(groups)) < 2:
        return Estimate(value, np.nan, np.nan)
    drawn = np.concatenate([statistic(weights) for weights in resampled(groups, seed=seed, resamples=resamples)])
    low, high = np.nanquantile(drawn, ENDS)
    return Estimate(value, float(low), float(high))


def ratio(
    numerators: np.ndarray, denominators: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """sum(numerators) / sum(denominators), both [N], with its interval over groups [N] (None: over items)."""
    groups = np.arange(len(numerators)) if groups is None else groups
    return bootstrap(lambda weights: (weights @ numerators) / (weights @ denominators), groups, seed=seed)


def ratios(
    numerators: np.ndarray, denominators: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> list[Estimate]:
    """`ratio` of each column of numerators [N, C], with its interval over groups [N] (None: over items); fewer than two
    groups have none, as in `bootstrap`."""
    groups = np.arange(len(denominators)) if groups is None else groups
    values = numerators.sum(0) / denominators.sum()
    if len(np.unique(groups)) < 2:
        return [Estimate(float(value), np.nan, np.nan) for value in values]
    weights = np.concatenate(list(resampled(groups, seed=seed)))
    low, high = np.quantile((weights @ numerators) / (weights @ denominators)[:, None], ENDS, axis=0)
    return [Estimate(*map(float, ends)) for ends in zip(values, low, high, strict=True)]


def mean(values: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0) -> Estimate:
    """The mean of values [N], with its interval over groups [N] (None: over items)."""
    return ratio(values, np.ones(len(values)), groups, seed=seed)
