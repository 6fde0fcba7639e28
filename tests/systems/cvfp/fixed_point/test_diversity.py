"""The losses of second moments, and the sum over tokens that has their gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.systems.cvfp.fixed_point.diversity import EPSILON, diversity_gradient, diversity_terms, separable

KINDS = ("variance", "log_det")


def contexts(tokens: int, width: int, seed: int = 0) -> Tensor:
    """With a mean, and of different sizes in different directions."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixed * 0.3 + 0.5


def moments(found: Tensor) -> Tensor:
    return found.T @ found / len(found)


def total(second: Tensor, kind: str) -> Tensor:
    return torch.stack(list(diversity_terms(second, kind).values())).sum()


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 1000), st.data())
@settings(max_examples=20)
def test_the_sum_over_tokens_has_the_gradient_of_the_loss_of_all_tokens_at_once(
    kind: str, width: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    found = contexts(tokens, width, seed)
    whole = found.clone().requires_grad_()
    total(moments(whole), kind).backward()
    _, gradient = diversity_gradient(moments(found), kind)
    parts = data.draw(st.lists(st.integers(1, 8), max_size=4))
    apart = found.clone().requires_grad_()
    borders = [size for size in torch.tensor([0, *parts]).cumsum(0).tolist() if size < tokens] + [tokens]
    for first, last in itertools.pairwise(borders):
        (separable(apart[first:last], gradient).sum() / tokens).backward()
    assert whole.grad is not None and apart.grad is not None
    assert torch.allclose(apart.grad, whole.grad, rtol=1e-9, atol=1e-9 * float(whole.grad.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_of_a_plain_computation(kind: str) -> None:
    second = moments(contexts(50, 5))
    expected = torch.zeros((), dtype=torch.float64)
    if kind == "log_det":
        values = torch.linalg.eigvalsh(second) + EPSILON
        expected += (values - torch.log(values)).mean() - 1
    else:
        for i in range(5):
            expected += max(0.0, 1 - float(second[i, i] + EPSILON) ** 0.5) / 5
            expected += sum(float(second[i, j]) ** 2 / 5 for j in range(5) if j != i)
    terms, _ = diversity_gradient(second.float(), kind)
    assert float(sum(terms.values())) == pytest.approx(float(expected), rel=1e-5)
    assert float(separable(contexts(50, 5), second).abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_least_for_independent_dimensions_and_bounded_where_all_contexts_are_alike(kind: str) -> None:
    width = 8
    least = total(torch.eye(width, dtype=torch.float64), kind)
    assert abs(float(least)) < 2e-4
    alike = torch.ones(width, width, dtype=torch.float64)
    none = torch.zeros(width, width, dtype=torch.float64)
    for worse in (alike, none, torch.diag(torch.tensor([8.0, *[0.0] * 7], dtype=torch.float64))):
        assert 0.5 < float(total(worse, kind)) <= max(9.3, width)


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 1000), st.floats(0.03, 30))
@settings(max_examples=30)
def test_no_contexts_of_any_size_have_a_loss_below_zero(
    kind: str, width: int, tokens: int, seed: int, scale: float
) -> None:
    found = moments(contexts(tokens, width, seed) * scale)
    # Of so few tokens the moments have no inverse.
    assert float(total(found, kind)) > -1e-9
    assert float(total(30**2 * torch.eye(width, dtype=torch.float64), "log_det")) > 800


@pytest.mark.parametrize("kind", KINDS)
def test_steps_along_the_gradient_at_moments_that_lag_spread_contexts(kind: str) -> None:
    width, free = 6, contexts(64, 6) * 0.1 + 1

    def normed(values: Tensor) -> Tensor:
        return values / values.norm(dim=1, keepdim=True) * width**0.5

    free = normed(free)
    averages = moments(free)
    first, mean = total(averages, kind), float(free.mean(0).norm() / width**0.5)
    assert mean > 0.9
    for _ in range(150):
        wanted = free.clone().requires_grad_()
        _, gradient = diversity_gradient(averages, kind)
        separable(normed(wanted), gradient).mean().backward()
        assert wanted.grad is not None
        free = normed(free - 2 * wanted.grad)
        averages = averages.lerp(moments(free), 0.1)
    assert float(total(moments(free), kind)) < 0.05 * float(first)
    # Moments of 1 in all directions leave this to the mean's own.
    assert float(free.mean(0).norm() / width**0.5) < width**-0.5 + 0.03
