"""Orders without a table: a permutation that is one, and shares that hold at any length."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.sources.base import Permutation
from pipeline.data.tokens.windows import Interleaving


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_many_places_at_once_are_those_one_by_one_and_a_permutation(size: int, seed: int, epoch: int) -> None:
    permutation = Permutation(size, "windows", seed, 0, epoch)
    found = permutation.many(np.arange(size, dtype=np.uint64))
    assert np.array_equal(np.sort(found), np.arange(size))
    some = range(0, size, 97)
    assert [permutation(index) for index in some] == found[some.start : some.stop : some.step].tolist()


def test_huge_permutations_need_no_memory_and_differ_by_key() -> None:
    size = 10**13 + 7
    places = np.arange(1000, dtype=np.uint64) * np.uint64(10**10)
    orders = [Permutation(size, "windows", seed, 0, epoch).many(places) for seed in (0, 1) for epoch in (0, 1)]
    assert all(order.max() < size and len(np.unique(order)) == 1000 for order in orders)
    assert all((a != b).all() for i, a in enumerate(orders) for b in orders[:i])
    for order in orders:
        # As uniform as 1000 draws are: 10 bins of 100 each, five standard deviations.
        assert abs(np.histogram(order, 10, (0, size))[0] - 100).max() < 48
        # Neighbours in the order are no neighbours in the data.
        assert np.abs(np.diff(order.astype(float))).min() > 1e6


def test_a_permutation_is_uniform_over_seeds() -> None:
    """Where each of 8 places goes, over 800 seeds: chi-squared with 49 degrees of freedom is below 100."""
    counts = np.zeros((8, 8))
    places = np.arange(8, dtype=np.uint64)
    for seed in range(800):
        counts[np.arange(8), Permutation(8, "windows", seed).many(places).astype(int)] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 100


ratios = st.lists(st.integers(1, 60), min_size=1, max_size=6).map(lambda w: [Fraction(x, sum(w)) for x in w])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(ratios, st.integers(1, 400), st.integers(1, 50))
def test_every_source_is_within_one_window_of_its_share(shares: list[Fraction], length: int, batch: int) -> None:
    order = Interleaving(shares)
    taken = [0] * len(shares)
    seen = [0] * len(shares)
    for start in range(0, length, batch):
        sources, numbers, taken = order.next(taken, batch)
        for offset, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
            assert number == seen[source]
            seen[source] += 1
            done = start + offset + 1
            assert all(abs(count - done * share) < 1 for count, share in zip(seen, shares, strict=True))
        assert taken == seen == order.taken_after(start + batch)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 10**15), min_size=2, max_size=6), st.integers(1, 500), st.integers(0, 2))
def test_where_sources_stand_is_known_without_what_came_before(weights: list[int], windows: int, rare: int) -> None:
    """Against one window after the other; also for ratios of many digits, and rare sources."""
    if rare:
        weights = [max(1, weights[0] // 10 ** (5 * rare)), *weights[1:]]
    order = Interleaving([Fraction(weight, sum(weights)) for weight in weights])
    _, _, taken = order.next([0] * len(weights), windows)
    assert order.taken_after(windows) == taken


def test_the_place_of_a_late_window_takes_no_time_that_grows_with_it() -> None:
    calls = []
    shares = [Fraction("0.3333333333333333"), Fraction("0.3333333333333334"), Fraction("0.3333333333333333")]
    order = Interleaving(shares)
    order.next = lambda *given: calls.append(given)  # type: ignore[method-assign,assignment,return-value]
    late = 10**15 + 1
    taken = order.taken_after(late)
    assert sum(taken) == late and not calls
    assert all(abs(count - late * ratio) < 1 for count, ratio in zip(taken, shares, strict=True))
