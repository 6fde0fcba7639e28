"""The gates cannot leave the region where the memory is stable, and start where the config says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops.gates import (
    MAX_FORGET,
    MAX_MOMENTUM,
    STEP_MARGIN,
    STRETCH,
    GateLinear,
    bounded_gates,
    initial_alpha_logits,
    initial_beta_logits,
    initial_eta_logit,
    logit,
)

anything = st.floats(-1e6, 1e6)
moderate = st.floats(-15, 15)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def logits(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((1, 1, 1), value, dtype=dtype)


def spread(ends: tuple[float, float], count: int) -> list[float]:
    """`count` numbers from the first to the second at equal ratios."""
    return torch.logspace(*(math.log10(end) for end in ends), count, dtype=torch.float64).tolist()


def test_the_limits_are_the_designs() -> None:
    assert (MAX_FORGET, STEP_MARGIN) == (0.01, 0.9)
    assert 0.9 < MAX_MOMENTUM < 1


@given(anything, anything, anything, dtypes)
def test_no_logits_leave_the_stable_region(alpha: float, beta: float, eta: float, dtype: torch.dtype) -> None:
    gates = bounded_gates(logits(alpha, dtype), logits(beta, dtype), torch.tensor([eta], dtype=dtype))
    # Each bound is rounded as the gate is: it holds exactly, not to a tolerance.
    assert 0 <= gates.alpha <= torch.tensor(MAX_FORGET, dtype=gates.alpha.dtype)
    assert 0 <= gates.eta <= torch.tensor(MAX_MOMENTUM, dtype=gates.eta.dtype)
    assert 0 <= gates.theta <= STEP_MARGIN * (1 - gates.eta) ** 2


@given(moderate, moderate, moderate)
def test_moderate_logits_are_inside_it_and_can_still_learn(alpha: float, beta: float, eta: float) -> None:
    inputs = [logits(alpha), logits(beta), torch.tensor([eta], dtype=torch.float64)]
    for tensor in inputs:
        tensor.requires_grad_()
    gates = bounded_gates(*inputs)
    assert 0 < gates.alpha < MAX_FORGET
    assert 0 < gates.eta < MAX_MOMENTUM < 1
    assert 0 < gates.theta < STEP_MARGIN * (1 - gates.eta) ** 2
    gradients = torch.autograd.grad((gates.alpha + gates.theta + gates.eta).sum(), inputs)
    assert all(gradient.isfinite().all() and gradient.ne(0).all() for gradient in gradients)


@given(moderate, moderate)
def test_each_gate_rises_with_its_logit(low: float, high: float) -> None:
    low, high = sorted((low, high))
    before = bounded_gates(logits(low), logits(low), torch.tensor([0.0], dtype=torch.float64))
    after = bounded_gates(logits(high), logits(high), torch.tensor([0.0], dtype=torch.float64))
    assert before.alpha <= after.alpha and before.theta <= after.theta


def test_momentum_is_one_number_per_head_and_leaves_the_other_heads_alone() -> None:
    alpha, beta = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    eta = torch.tensor([-2.0, 0.0, 2.0])
    gates = bounded_gates(alpha, beta, eta)
    assert gates.alpha.shape == gates.eta.shape == gates.theta.shape == (2, 5, 3)
    assert torch.equal(gates.eta, (MAX_MOMENTUM * eta.sigmoid()).expand(2, 5, 3))
    moved = bounded_gates(alpha, beta, torch.tensor([-2.0, 1.0, 2.0]))
    assert torch.equal(moved.theta[..., [0, 2]], gates.theta[..., [0, 2]])
    assert (moved.theta[..., 1] < gates.theta[..., 1]).all()


def test_the_delta_rule_has_no_momentum_and_the_widest_steps() -> None:
    beta = torch.linspace(-5, 5, 30).view(2, 5, 3)
    gates = bounded_gates(torch.zeros(2, 5, 3), beta, None)
    assert gates.eta.shape == (2, 5, 3) and not gates.eta.any()
    assert torch.equal(gates.theta, STEP_MARGIN * beta.sigmoid())


@pytest.mark.parametrize(
    "given_dtype, dtype",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gates_are_never_half_precision(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """1 - alpha is 1 in bfloat16 for every useful forget rate."""
    gates = bounded_gates(logits(-3, given_dtype), logits(-3, given_dtype), torch.zeros(1, dtype=given_dtype))
    assert gates.alpha.dtype == gates.eta.dtype == gates.theta.dtype == dtype
    assert (1 - gates.alpha).lt(1).all()


def initial(heads: int, momentum: float, step_size: tuple[float, float], half_life: tuple[float, float]):
    """Gates of a memory that has learned nothing, per head."""
    gates = bounded_gates(
        initial_alpha_logits(heads, half_life).double().view(1, 1, -1),
        initial_beta_logits(heads, momentum, step_size).double().view(1, 1, -1),
        torch.full((heads,), initial_eta_logit(momentum), dtype=torch.float64),
    )
    return gates.alpha.flatten(), gates.eta.flatten(), gates.theta.flatten()


@given(
    st.integers(1, 32), st.floats(0.01, 0.2),
    st.tuples(st.floats(1e-4, 0.55), st.floats(1e-4, 0.55)), st.tuples(st.floats(80, 1e7), st.floats(80, 1e7)),
)  # fmt: skip
def test_initial_gates_are_the_configs_spread(
    heads: int, momentum: float, step_size: tuple[float, float], half_life: tuple[float, float]
) -> None:
    alpha, eta, theta = initial(heads, momentum, step_size, half_life)
    half_lives = math.log(2) / -torch.log1p(-alpha)
    assert eta.tolist() == pytest.approx([momentum] * heads)
    if heads == 1:
        assert (float(theta), float(half_lives)) == pytest.approx((step_size[0], half_life[0]), rel=1e-5)
    else:
        assert theta.tolist() == pytest.approx(spread(step_size, heads), rel=1e-5)
        assert half_lives.tolist() == pytest.approx(spread(half_life, heads), rel=1e-4)


def test_initial_gates_of_the_default_config() -> None:
    alpha, eta, theta = initial(16, 0.1, (0.5, 0.002), (1e3, 1e6))
    assert (float(theta[0]), float(theta[-1])) == pytest.approx((0.5, 0.002))
    assert (math.log(2) / float(alpha[0]), math.log(2) / float(alpha[-1])) == pytest.approx((1e3, 1e6), rel=1e-3)
    assert theta.diff().lt(0).all() and alpha.diff().lt(0).all()
    assert eta.tolist() == pytest.approx([0.1] * 16)


@given(st.integers(2, 8))
def test_a_spread_beyond_the_bounds_starts_at_the_bounds(heads: int) -> None:
    alpha, _, theta = initial(heads, 0.5, (1.0, 0.1), (1.0, 1e6))
    assert float(theta[0]) == pytest.approx(STEP_MARGIN * 0.25, rel=2e-3)
    assert float(alpha[0]) == pytest.approx(MAX_FORGET, rel=2e-3)


@given(st.floats(1e-6, 1 - 1e-6))
def test_logit_is_the_inverse_of_the_sigmoid(probability: float) -> None:
    assert 1 / (1 + math.exp(-logit(probability))) == pytest.approx(probability)


@given(anything, anything)
def test_a_stretched_gate_is_cut_at_both_ends(beta: float, eta: float) -> None:
    gates = bounded_gates(logits(0.0), logits(beta), torch.tensor([eta], dtype=torch.float64), stretch=STRETCH)
    assert 0 <= gates.theta <= STEP_MARGIN * (1 - gates.eta) ** 2
    # (1 + 2 s) sigmoid(x) - s is 0 at x = log(s / (1 + s)) and 1 at the opposite.
    cut = math.log(STRETCH / (1 + STRETCH))
    if beta < cut - 1e-9:
        assert gates.theta == 0
    if beta > -cut + 1e-9:
        assert gates.theta == STEP_MARGIN * (1 - gates.eta) ** 2
    if cut + 1e-9 < beta < -cut - 1e-9:
        assert 0 < gates.theta < STEP_MARGIN * (1 - gates.eta) ** 2
    assert gates.alpha == MAX_FORGET / 2, "forget rates are not stretched"


def test_a_stretched_gate_closes_with_a_slope_that_does_not_vanish() -> None:
    beta = logits(math.log(STRETCH / (1 + STRETCH)) + 1e-6).requires_grad_()
    (slope,) = torch.autograd.grad(bounded_gates(logits(0.0), beta, None, stretch=STRETCH).theta.sum(), beta)
    share = STRETCH / (1 + 2 * STRETCH)
    assert float(slope) == pytest.approx(STEP_MARGIN * (1 + 2 * STRETCH) * share * (1 - share), rel=1e-4)
    closed = logits(-5.0).requires_grad_()
    (none,) = torch.autograd.grad(bounded_gates(logits(0.0), closed, None, stretch=STRETCH).theta.sum(), closed)
    assert float(none) == 0


def test_stretched_gates_start_where_the_config_says() -> None:
    for ends in ((0.5, 0.002), (0.1, 0.1), (1e-6, 0.7)):
        beta = initial_beta_logits(4, 0.1, ends, STRETCH)
        eta = torch.full((4,), initial_eta_logit(0.1))
        gates = bounded_gates(torch.zeros(1, 1, 4), beta.view(1, 1, 4), eta, stretch=STRETCH)
        assert gates.theta.flatten().tolist() == pytest.approx(spread(ends, 4), rel=2e-2, abs=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_a_gate_of_normed_tokens_is_that_of_their_rms_norm(dtype: torch.dtype, limit: float) -> None:
    """Values and gradients against the norm and the projection one after the other, in float64; a token may be zero."""
    rng = torch.Generator().manual_seed(0)
    project = GateLinear(48, 3).to(dtype)
    tokens = torch.randn(2, 5, 48, generator=rng).to(dtype)
    tokens[0, 2] = 0
    probe = torch.randn(2, 5, 3, generator=rng, dtype=torch.float64)
    x, exact = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    weight, bias = (parameter.detach().double().requires_grad_() for parameter in project.parameters())
    found = project(x, 1e-6)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.nn.functional.linear(torch.nn.functional.rms_norm(exact, (48,), eps=1e-6), weight, bias)
    (found * probe.to(found.dtype)).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)
    for one, other in ((x, exact), (project.weight, weight), (project.bias, bias)):
        assert one.grad is not None and other.grad is not None
        rounding = limit if dtype != torch.bfloat16 else 5e-3
        assert (one.grad.double() - other.grad).norm() <= rounding * other.grad.norm()
