"""The effective rank against numpy's singular values of the contexts themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.systems.cvfp.evaluation.rank import (
    effective_rank,
    gaussian_rank,
    gaussian_values,
    singular_values,
)


def prototype_rank(contexts: np.ndarray) -> float:
    """As the prototype computes it, of the contexts themselves."""
    values = np.linalg.svd(contexts, compute_uv=False)
    shares = values / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares + 1e-10))))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
def test_the_rank_is_that_of_the_contexts_singular_values(tokens: int, width: int, rank: int, seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    contexts = generator.standard_normal((tokens, rank)) @ generator.standard_normal((rank, width)) + 3
    values = singular_values(torch.from_numpy(contexts.T @ contexts))
    expected = prototype_rank(contexts)
    assert effective_rank(values) == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_equal_directions_have_full_rank_and_nothing_has_none() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7, rel=1e-8)
    assert effective_rank(torch.zeros(7)) == 0
    assert gaussian_rank(0, 5) == 0


@pytest.mark.parametrize(("tokens", "width"), [(400, 24), (24, 400), (30, 30)])
def test_the_gaussian_baseline_has_the_distribution_of_a_drawn_matrix(tokens: int, width: int) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    drawn = [prototype_rank(generator.standard_normal((tokens, width))) for _ in range(200)]
    found = [gaussian_rank(tokens, width, seed) for seed in range(200)]
    error = (np.var(drawn) / 200 + np.var(found) / 200) ** 0.5
    assert abs(np.mean(found) - np.mean(drawn)) < 4 * error
    assert np.std(found) == pytest.approx(np.std(drawn), rel=0.3)
    energy = float(gaussian_values(tokens, width).square().sum())
    assert energy == pytest.approx(tokens * width, rel=0.2)


def test_the_published_ceilings_are_those_of_independent_numbers() -> None:
    """What the specification measured: 90.8 % of 768 at 1,280 tokens, 98.4 % at 6,400, 99.5 % at 20,000."""
    for tokens, share in ((1280, 0.908), (6400, 0.984), (20_000, 0.995)):
        assert gaussian_rank(tokens, 768) / 768 == pytest.approx(share, abs=0.001)
