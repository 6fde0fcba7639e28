"""Floors of the cross-entropy: those of the specification, and sums over everything there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pipeline.systems.mimir.diffusion.absorbing import AbsorbingKernel
from pipeline.systems.mimir.diffusion.floor import floor, floor_with_padding
from pipeline.systems.mimir.diffusion.uniform import UniformKernel
from tests.systems.mimir.diffusion.reference import between, exact_prediction, swiss_prot


@pytest.mark.parametrize("T, expected", [(10, 1.51), (25, 1.42), (35, 1.41)])
def test_the_specification_s_floors(T: int, expected: float) -> None:
    result = floor(UniformKernel(T, 25), swiss_prot())
    assert result.ce == pytest.approx(expected, abs=5e-3)
    assert result.entropy == pytest.approx(2.889, abs=5e-4)


def test_masks_have_the_entropy_as_their_floor() -> None:
    result = floor(AbsorbingKernel(20, 25), swiss_prot())
    assert result.ce == result.entropy == pytest.approx(2.889, abs=5e-4)


@pytest.mark.parametrize("K, T", [(2, 1), (5, 10), (30, 4)])
def test_the_floor_is_the_mean_cross_entropy_of_the_exact_prediction(K: int, T: int) -> None:
    f = np.arange(1, K + 1) / np.arange(1, K + 1).sum()
    expected = np.mean(
        [-(f[:, None] * between(T, K, 0, t) * np.log(exact_prediction(f, T, t).T)).sum() for t in range(1, T + 1)]
    )
    assert floor(UniformKernel(T, K), f).ce == pytest.approx(expected, rel=1e-10)


def test_a_composition_by_position_counts_by_its_residues() -> None:
    kernel = UniformKernel(10, 3)
    rows = np.array([[10, 20, 30], [4, 0, 0], [0, 0, 0]])
    whole = floor(kernel, rows)
    assert whole.ce == pytest.approx((60 * floor(kernel, rows[0]).ce + 4 * floor(kernel, rows[1]).ce) / 64)
    assert whole.entropy == pytest.approx(floor(kernel, rows[0]).entropy * 60 / 64)
    weighted = floor(kernel, rows / 7, np.array([1, 3, 0]))
    assert weighted.ce == pytest.approx((floor(kernel, rows[0]).ce + 3 * floor(kernel, rows[1]).ce) / 4)
    assert floor(kernel, rows[1]).ce == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "frequencies, weights",
    [([1, 1], None), ([0, 0, 0], None), ([1, -1, 3], None), ([[1, 1, 1]], [1, 2]), ([[1, 1, 1]], [-1])],
)
def test_nonsense_is_refused(frequencies: list[float], weights: list[float] | None) -> None:
    with pytest.raises(ValueError):
        floor(UniformKernel(10, 3), np.array(frequencies), None if weights is None else np.array(weights))


def test_with_padding_it_is_the_sum_over_all_noisy_peptides() -> None:
    """Two letters, up to three slots: every peptide with every noisy version of it, 27 each way."""
    T, slots = 3, 3
    f, lengths = np.array([0.7, 0.3]), np.array([1, 2, 3, 2]) / 8
    share = {}
    for length in range(slots + 1):
        for letters in itertools.product(range(2), repeat=length):
            share[letters + (2,) * (slots - length)] = lengths[length] * np.prod(f[list(letters)])
    expected = 0.0
    for t in range(1, T + 1):
        matrix = between(T, 3, 0, t)
        for noisy in itertools.product(range(3), repeat=slots):
            joint = np.zeros((slots, 3))
            for peptide, p in share.items():
                both = p * np.prod(matrix[list(peptide), list(noisy)])
                for slot in range(slots):
                    joint[slot, peptide[slot]] += both
            used = joint > 0
            expected -= (joint * np.log(np.where(used, joint, 1) / joint.sum(-1, keepdims=True))).sum() / slots / T
    assert floor_with_padding(T, f, lengths * 80, samples=8000) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("mean, expected", [(10.4, 0.90), (12.0, 1.02), (13.6, 1.15)])
def test_with_padding_it_is_what_the_specification_says(mean: float, expected: float) -> None:
    """The specification gives the mean lengths alone; the value depends on the histogram's width too, by 0.03 between
    a bell and equally many of each."""
    places = np.arange(21)
    low, high = 0.0, 25.0
    for _ in range(40):
        centre = (low + high) / 2
        bell = np.where(places >= 4, np.exp(-(((places - centre) / 3.5) ** 2) / 2), 0)
        low, high = (centre, high) if bell @ places < mean * bell.sum() else (low, centre)
    assert floor_with_padding(10, swiss_prot(24), bell, samples=1000) == pytest.approx(expected, abs=0.02)
