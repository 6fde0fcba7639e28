"""AUROC against its definition, and rankings whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.systems.mimir.evaluation.ranking import auroc, rank, roc

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@settings(max_examples=25)
@given(SCORES, SCORES)
def test_auroc_is_the_probability_that_a_positive_is_above_a_negative(
    positive: list[float], negative: list[float]
) -> None:
    wanted = np.mean([(p > n) + 0.5 * (p == n) for p in positive for n in negative])
    assert auroc(np.array(positive), np.array(negative)) == pytest.approx(wanted)
    assert auroc(np.array(negative), np.array(positive)) == pytest.approx(1 - wanted)


def test_normal_scores_have_the_auroc_of_their_distance() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    ratios = generator.normal(size=(300, 6))
    ratios[:, 0] += 1.0
    found = rank(ratios)
    wanted = 0.5 * (1 + math.erf(0.5))  # Phi(1 / sqrt 2)
    for estimate in (found.auroc, found.within):
        assert estimate.value == pytest.approx(wanted, abs=0.04)
        assert estimate.low < wanted < estimate.high and estimate.high - estimate.low < 0.1
    assert found.auroc.value == pytest.approx(auroc(ratios[:, 0], ratios[:, 1:].ravel()))
    assert found.chance == pytest.approx(1 / 6) and found.first.low > found.chance


def test_scores_that_say_nothing_are_at_chance() -> None:
    ratios = np.random.Generator(np.random.PCG64(5)).normal(size=(200, 5))
    found = rank(ratios)
    assert found.auroc.low < 0.5 < found.auroc.high
    assert found.within.low < 0.5 < found.within.high
    assert found.first.low < 0.2 < found.first.high
    alike = rank(np.zeros((10, 4)))
    assert alike.auroc.value == alike.within.value == 0.5 and alike.first.value == 0.25


def test_a_peptide_whose_ratios_are_all_high_says_nothing_within_itself() -> None:
    """Peptides differ in level; each ranks its own target first."""
    levels = np.arange(6.0)[:, None] * 10
    found = rank(levels + np.array([[1.0, 0.0, 0.5]]))
    assert found.within.value == found.first.value == 1.0
    assert 0.5 < found.auroc.value < 0.7, "over all pairs the levels hide it"


def test_without_decoys_there_is_no_ranking() -> None:
    for ratios in (np.ones((3, 1)), np.array([[1.0, np.nan]])):
        found = rank(ratios)
        assert math.isnan(found.auroc.value) and math.isnan(found.within.value)


def test_peptides_may_have_decoys_in_different_numbers() -> None:
    ratios = np.array([[3.0, 1.0, np.nan, 4.0], [2.0, np.nan, np.nan, 2.0], [9.0, np.nan, np.nan, np.nan]])
    found = rank(ratios)
    assert found.within.value == pytest.approx((0.5 + 0.5) / 2)
    assert found.first.value == pytest.approx((0.0 + 0.5) / 2) and found.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.auroc.value == pytest.approx(auroc(np.array([3.0, 2.0]), np.array([1.0, 4.0, 2.0])))
    curve = roc(ratios[:2], np.array([0.0, 0.3, 1.0]))
    assert curve.tolist() == [0.0, 0.0, 1.0]
    generator = np.random.Generator(np.random.PCG64(9))
    many = generator.normal(size=(300, 6)) + 0.8 * (np.arange(6) == 0)
    few = many.copy()
    few[7, 2:] = np.nan
    whole, one = rank(many), rank(few)
    assert one.within.high - one.within.low < 1.1 * (whole.within.high - whole.within.low)
    assert one.chance == pytest.approx(1 / 6, abs=0.01)


@settings(max_examples=25)
@given(SCORES, SCORES)
def test_the_area_under_the_curve_is_auroc(positive: list[float], negative: list[float]) -> None:
    count = min(len(positive), len(negative))
    ratios = np.array([positive[:count], negative[:count]]).T
    rates = np.linspace(0, 1, 1 + 840)  # of all shares of at most eight decoys
    curve = roc(ratios, rates)
    assert (np.diff(curve) >= 0).all() and curve[-1] == 1.0
    wanted = auroc(ratios[:, 0], ratios[:, 1])
    area = (curve[:-1] + curve[1:]).sum() / 2 / 840
    assert area == pytest.approx(wanted, abs=count / 840)
