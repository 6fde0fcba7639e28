"""Measures of drawn peptides on lists whose answer can be counted."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.systems.mimir.evaluation.samples import (
    AMINO_ACIDS,
    diversity,
    novelty,
    uniqueness,
    uniqueness_by_count,
    validity,
)


def test_a_peptide_is_valid_by_its_letters_and_its_length() -> None:
    found = validity(["ACDEF", "ACXEF", "ACU", "ACDEFG", "", "WWWW"], 3, 5)
    assert found.value == pytest.approx(2 / 6) and 0 < found.low < 2 / 6 < found.high < 1
    assert validity(["AXB"], 3, 3, "ABX").value == 1.0
    assert len(AMINO_ACIDS) == 20 and not set("BJOUXZ") & set(AMINO_ACIDS)


def test_uniqueness_counts_different_sequences() -> None:
    texts = ["A", "B", "A", "C", "A"]
    assert uniqueness(texts) == 0.6
    assert uniqueness_by_count(texts, (1, 2, 3, 5)) == [1.0, 1.0, 2 / 3, 0.6]
    assert math.isnan(uniqueness([]))


def test_novelty_is_of_different_sequences() -> None:
    found = novelty(["A", "A", "A", "B", "C"], {"A"})
    assert found.value == pytest.approx(2 / 3)
    assert math.isnan(novelty([], {"A"}).value)


def test_diversity_is_the_mean_distance_of_two() -> None:
    assert diversity(["ACDE"] * 5).value == 0.0
    assert diversity(["AAAA", "CCCC"]).value == 1.0
    # A pair differs in one residue of four in 2 of 3 cases of this set, and in two in the third.
    assert diversity(["AAAA", "AAAC", "AACA"]).value == pytest.approx((0.25 + 0.25 + 0.5) / 3, abs=0.02)
    assert math.isnan(diversity(["A"]).value)
    assert diversity(["AC", "ACDEFGHI", "WW"], seed=1) == diversity(["AC", "ACDEFGHI", "WW"], seed=1)
    assert np.isfinite(diversity(["AC", "ACDEFGHI", "WW"]).low)
