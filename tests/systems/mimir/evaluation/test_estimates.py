"""Intervals: what they cover, and where they have no width."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.systems.mimir.evaluation.bits import bits_per_residue
from pipeline.systems.mimir.evaluation.estimates import bootstrap, mean, ratio, ratios, resampled, share

GENERATOR = np.random.Generator(np.random.PCG64(7))


def test_bits_per_residue_are_nats_of_all_peptides_by_their_residues() -> None:
    found = bits_per_residue(np.array([4.0, 8.0]) * math.log(2), np.array([1, 5]))
    assert found.value == pytest.approx(2.0), "not the mean of 4 and 1.6"
    assert found.low == pytest.approx(1.6) and found.high == pytest.approx(4.0), "either peptide alone"


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = GENERATOR.normal(3.0, 2.0, 400)
    found, error = mean(values), values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_intervals_cover_what_is_estimated() -> None:
    covered = 0
    for seed in range(80):
        lengths = GENERATOR.integers(4, 21, 80)
        nats = GENERATOR.exponential(2.0, 80) * lengths
        found = bits_per_residue(nats, lengths, seed=seed)
        covered += found.low <= 2.0 / math.log(2) <= found.high
    assert 68 <= covered <= 79, covered


def test_peptides_of_a_group_are_no_independent_ones() -> None:
    of_group = GENERATOR.normal(0.0, 1.0, 25)
    values, groups = np.repeat(of_group, 40), np.repeat(np.arange(25), 40)
    apart, together = mean(values), mean(values, groups)
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 5 * (apart.high - apart.low)
    weights = next(resampled(groups))
    assert (weights.reshape(-1, 25, 40) == weights.reshape(-1, 25, 40)[..., :1]).all(), "whole groups are drawn"


def test_one_group_has_no_interval_and_nothing_has_no_value() -> None:
    found = ratio(np.array([1.0, 3.0]), np.array([1.0, 1.0]), np.array([5, 5]))
    assert found.value == 2.0 and math.isnan(found.low) and math.isnan(found.high)
    (column,) = ratios(np.array([[1.0], [3.0]]), np.array([1.0, 1.0]), np.array([5, 5]))
    assert column.value == 2.0 and math.isnan(column.low) and math.isnan(column.high)
    assert math.isnan(mean(np.array([])).value) and math.isnan(share(np.array([], bool)).value)
    assert math.isnan(bits_per_residue(np.array([]), np.array([])).value)


def test_a_share_has_wilsons_interval() -> None:
    found = share(np.arange(96) < 96)
    assert (found.value, round(found.low, 3), found.high) == (1.0, 0.962, 1.0)


def test_a_seed_decides_an_interval() -> None:
    values = GENERATOR.normal(size=50)
    assert mean(values, seed=1) == mean(values, seed=1) != mean(values, seed=2)
    found = bootstrap(lambda weights: weights.max(1), np.arange(10), resamples=70)
    assert found.value == 1.0 and found.low >= 1.0


def test_columns_have_the_intervals_of_ratios() -> None:
    numerators, denominators = GENERATOR.random((60, 3)), GENERATOR.integers(4, 21, 60).astype(float)
    for column, found in zip(numerators.T, ratios(numerators, denominators, seed=4), strict=True):
        alone = ratio(column, denominators, seed=4)
        assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high))
    groups = np.arange(60) // 6
    (found, *_), alone = ratios(numerators, denominators, groups), ratio(numerators[:, 0], denominators, groups)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
