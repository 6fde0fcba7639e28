"""Distances on sets whose distance is known, and their error on sets of one distribution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.systems.mimir.evaluation.distances import (
    composition_distance,
    kmer_distance,
    length_distance,
    total_variation,
    wasserstein,
)
from pipeline.systems.mimir.evaluation.kmers import kmers
from pipeline.systems.mimir.peptides import chosen
from tests.systems.mimir.evaluation.sets import LETTERS, independent, peptides

TEXTS = st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1, max_size=5)


@settings(max_examples=30)
@given(TEXTS, st.integers(1, 4))
def test_kmers_are_the_runs_of_each_text(texts: list[str], k: int) -> None:
    owners, numbers = kmers(peptides(texts), k, len(LETTERS))
    found = [(owner, "".join(LETTERS[number // 4**place % 4] for place in reversed(range(k))))
             for owner, number in zip(owners.tolist(), numbers.tolist(), strict=True)]  # fmt: skip
    assert found == [(i, text[start : start + k]) for i, text in enumerate(texts) for start in range(len(text) - k + 1)]


def test_distances_of_sets_that_are_known() -> None:
    a, b = peptides(["AABB", "AB"]), peptides(["ABCD"])
    assert composition_distance(a, b, 4).value == pytest.approx(0.5)
    # AA AB BB AB against AB BC CD.
    assert kmer_distance(a, b, 2, 4).value == pytest.approx(2 / 3)
    assert kmer_distance(a, b, 4, 4).value == 1.0
    assert length_distance(a, b).value == pytest.approx(1.0)
    assert length_distance(peptides(["AAAA"]), peptides(["A", "AA"])).value == pytest.approx(2.5)


def test_nothing_is_no_distance() -> None:
    assert np.isnan(kmer_distance(peptides(["A"]), peptides(["ABCD"]), 3, 4).value)


@settings(max_examples=30)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_the_two_distances_are_metrics_of_distributions(first: list[float], second: list[float]) -> None:
    p, q = np.array(first) / sum(first), np.array(second) / sum(second)
    for between in (total_variation, wasserstein):
        assert between(p, p) == 0.0 and between(p, q) == pytest.approx(between(q, p))
    assert total_variation(p, q) == pytest.approx(1 - np.minimum(p, q).sum())
    assert total_variation(p, q) <= wasserstein(p, q) + 1e-12 <= 2 * total_variation(p, q) + 1e-9


def test_sets_of_one_distribution_are_as_far_apart_as_chance_makes_them() -> None:
    generator = np.random.Generator(np.random.PCG64(11))
    above = {"composition": 0, "2-mers": 0, "length": 0}
    values: dict[str, list[float]] = {name: [] for name in above}
    expected: dict[str, list[float]] = {name: [] for name in above}
    for seed in range(40):
        a, b = independent(generator, 60), independent(generator, 90)
        found = {
            "composition": composition_distance(a, b, 4, seed=seed), "2-mers": kmer_distance(a, b, 2, 4, seed=seed),
            "length": length_distance(a, b, seed=seed),
        }  # fmt: skip
        for name, distance in found.items():
            above[name] += distance.value > distance.upper
            values[name].append(distance.value)
            expected[name].append(distance.expected)
            assert distance.excess == distance.value - distance.expected
    assert all(count <= 6 for count in above.values()), "5 % of 40, and what chance adds"
    for name in above:
        error = np.std(values[name]) / np.sqrt(40)
        assert np.mean(values[name]) == pytest.approx(np.mean(expected[name]), abs=3 * error)


def test_another_distribution_is_further_than_chance() -> None:
    generator = np.random.Generator(np.random.PCG64(13))
    a = independent(generator, 400)
    b = independent(generator, 400, (0.4, 0.2, 0.2, 0.2), shortest=6)
    found = composition_distance(a, b, 4)
    assert found.value > found.upper and found.value == pytest.approx(0.15, abs=0.03)
    found = length_distance(a, b)
    assert found.value > found.upper and found.value == pytest.approx(1.0, abs=0.2)


def test_clusters_of_one_distribution_are_as_far_apart_as_chance_makes_them() -> None:
    """Of 20 clusters of five alike, and as many single peptides."""
    generator = np.random.Generator(np.random.PCG64(19))
    above, apart, expected = [0, 0], [], []
    for seed in range(40):
        a, b = independent(generator, 100), chosen(independent(generator, 20), np.repeat(np.arange(20), 5))
        groups = np.repeat(np.arange(20), 5)
        found = [kmer_distance(a, b, 1, 4, of, seed=seed) for of in (groups, None)]
        for number, distance in enumerate(found):
            above[number] += distance.value > distance.upper
        apart.append(found[0].value)
        expected.append(found[0].expected)
        assert length_distance(a, b, groups, seed=seed).expected > length_distance(a, b, seed=seed).expected
    assert above[0] <= 6 < 15 < above[1], "5 % of 40, and what chance adds"
    assert np.mean(apart) == pytest.approx(np.mean(expected), abs=3 * np.std(apart) / np.sqrt(40))


def test_whole_peptides_change_sides() -> None:
    """Of peptides that are one letter each, ten residues are one draw: the error is that of as many peptides."""
    generator = np.random.Generator(np.random.PCG64(17))
    texts = ["AAAAAAAA" if letter else "BBBBBBBB" for letter in generator.integers(0, 2, 200)]
    clumped = composition_distance(peptides(texts[:100]), peptides(texts[100:]), 4)
    assert clumped.expected == pytest.approx(np.sqrt(2 / np.pi) * np.sqrt(0.25 * 2 / 100), rel=0.15)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_of_a_group_that_does_not_fit_as_many_change_sides_as_there_is_place_for(size: int) -> None:
    """One peptide beside a group of others: either it is on the first side, or one of them is."""
    b, groups = peptides(["BBBB"] * size + ["CCCC"]), np.array([0] * size + [1])
    found = composition_distance(peptides(["AAAA"]), b, 4, groups)
    # A, one of B, or C by itself is as far from the others as can be.
    assert (found.value, found.expected, found.upper) == pytest.approx((1.0, 1.0, 1.0))


def test_a_large_group_of_one_distribution_is_as_far_as_chance_makes_it() -> None:
    """Of 20 peptides, and of 40 beside a group of 60 alike."""
    generator = np.random.Generator(np.random.PCG64(23))
    groups = np.concatenate([np.arange(40), np.full(60, 40)])
    above = 0
    for seed in range(40):
        a, b = independent(generator, 20), chosen(independent(generator, 41), groups)
        found = composition_distance(a, b, 4, groups, seed=seed)
        assert np.isfinite([found.expected, found.upper]).all() and 0 < found.expected < found.upper
        above += found.value > found.upper
    assert above <= 6, "5 % of 40, and what chance adds"
