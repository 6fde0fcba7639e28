"""The model's gates cannot make the memory grow, whatever the keys; arbitrary gates can.

The model holds one momentum eta per head and keeps its gates in the range

    eta <= 0.99,  alpha_t <= 0.01,  theta_t = tau_t (1 - eta)^2 with tau_t = 0.9 beta_t, 0 <= beta_t <= 1.

Why nothing grows there. Let z = M + eta / (1 - eta) S, where the memory would come to rest, and s = S / (1 - eta); then
M = z - eta s. For a unit key k with value v, the rows of (z, s) along k, with p = tau (1 - eta), follow

    [z', s'] = A(tau, alpha) [z, s] + p [v, v],    A = [[1 - p - alpha, (p + alpha) eta], [-p, (1 + p) eta]],

and those across k the same with tau = 0, v = 0. In the norm |x|^2 = |z|^2 + kappa |s|^2, kappa = 1 + eta / 2, A
does not stretch at the four corners of tau in {0, .9}, alpha in {0, .01} (tested below on a grid of eta), so nowhere
between them either: A is affine in (tau, alpha) and its norm convex. The norm is the same for every key and token, so
the product over any sequence of unit keys does not stretch. With rho = max over tau of |A(tau, alpha)| <= 1:

- Values that some matrix W explains, v_t = k_t W: x - (W, 0) follows A with the drive -alpha (W, 0), hence
  |x_T - (W, 0)| <= (rho^T + alpha (1 + rho + ... + rho^{T-1})) |W|.
- Values drawn independently with mean zero, |v| = 1: the cross terms vanish in the mean, so
  E |x_T|^2 <= p^2 (1 + kappa) (1 + rho^2 + ... + rho^{2(T-1)}), at most sqrt(T) growth of the norm.

Finally |M| <= sqrt(1 + eta^2 / kappa) |x|, and |S| <= (1 - eta) |x| / sqrt(kappa).
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import miras_scan

DIM, VALUE_DIM = 16, 4
MAX_TAU, MAX_ALPHA, MAX_ETA = 0.9, 0.01, 0.99
BETA_OFF = 1 / (1 + math.exp(20))
CORNERS = list(product((0.0, 0.5, 0.9, MAX_ETA), (BETA_OFF, 1.0), (0.0, MAX_ALPHA)))  # eta, beta, alpha: one head each
PATTERNS = ("iid", "constant", "distance", "cyclic")


def kappa(eta: float) -> float:
    return 1 + eta / 2


def stretch(eta: float, tau: float, alpha: float) -> float:
    """|A(tau, alpha)| in the norm of the module docstring."""
    p, root = tau * (1 - eta), math.sqrt(kappa(eta))
    a = torch.tensor([[1 - p - alpha, (p + alpha) * eta / root], [-p * root, (1 + p) * eta]], dtype=torch.float64)
    return float(torch.linalg.matrix_norm(a, ord=2))


def gates(sequence: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, eta, theta at every corner of the model's range, [1, sequence, corners]."""
    eta, beta, alpha = torch.tensor(CORNERS, dtype=torch.float64).T
    theta = MAX_TAU * beta * (1 - eta) ** 2
    return tuple(gate.to(dtype).expand(1, sequence, -1) for gate in (alpha, eta, theta))


def unit(*shape: int, rng: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=rng, dtype=torch.float64), dim=-1)


def keys(start: int, sequence: int, rng: torch.Generator) -> Tensor:
    """Unit keys of tokens from ``start``, [patterns, sequence, 1, DIM]; ``distance``: the same 8 every 48 tokens."""
    fixed = unit(48, DIM, rng=torch.Generator().manual_seed(11))
    place = torch.arange(start, start + sequence) % 48
    fresh = unit(sequence, DIM, rng=rng)
    repeats = torch.where((place < 8)[:, None], fixed[place], fresh)
    return torch.stack([fresh, fixed[:1].expand(sequence, DIM), repeats, fixed[place]])[:, :, None]


def lane_norm(state: Tensor) -> Tensor:
    return state.double().flatten(2).norm(dim=-1)


def weighted_norm(memory: Tensor, momentum: Tensor) -> Tensor:
    """The norm of the module docstring, per row and corner."""
    eta = torch.tensor(CORNERS, dtype=torch.float64)[:, 0, None, None]
    z = memory.double() + eta / (1 - eta) * momentum.double()
    s = momentum.double() / (1 - eta)
    return (lane_norm(z) ** 2 + (1 + eta.flatten() / 2) * lane_norm(s) ** 2).sqrt()


def geometric(ratio: float, terms: int) -> float:
    return float(terms) if ratio >= 1 else (1 - ratio**terms) / (1 - ratio)


def bounds(tokens: int, target: float) -> tuple[Tensor, Tensor]:
    """Bounds of |x| after ``tokens`` at every corner, for explained values (|W| = target) and for independent ones."""
    explained, independent = [], []
    for eta, beta, alpha in CORNERS:
        rho = min(1.0, max(stretch(eta, 0, alpha), stretch(eta, MAX_TAU * beta, alpha)))
        explained.append(target * (1 + rho**tokens + alpha * geometric(rho, tokens)))
        p = MAX_TAU * beta * (1 - eta)
        independent.append(p * math.sqrt((1 + kappa(eta)) * geometric(rho**2, tokens)))
    return torch.tensor(explained, dtype=torch.float64), torch.tensor(independent, dtype=torch.float64)


def test_the_norm_does_not_grow_anywhere_in_the_models_range() -> None:
    for eta in torch.linspace(0, MAX_ETA, 991, dtype=torch.float64).tolist():
        for tau, alpha in product((0.0, MAX_TAU), (0.0, MAX_ALPHA)):
            assert stretch(eta, tau, alpha) <= 1 + 1e-12, (eta, tau, alpha)


def test_the_norm_of_a_state_never_grows_without_values() -> None:
    """The algebra of the module docstring, on the op itself: zero values, random state, every corner and pattern."""
    rng = torch.Generator().manual_seed(0)
    size, rows, heads = 16, len(PATTERNS), len(CORNERS)
    state = tuple(torch.randn(rows, heads, DIM, VALUE_DIM, generator=rng, dtype=torch.float64) for _ in range(2))
    alpha, eta, theta = (gate.expand(rows, -1, -1) for gate in gates(size, torch.float64))
    v = torch.zeros(rows, size, heads, VALUE_DIM, dtype=torch.float64)
    before = weighted_norm(*state)
    for start in range(0, 1024, size):
        k = keys(start, size, rng).expand(-1, -1, heads, -1)
        _, state = miras_scan(k, k, v, alpha, eta, theta, state=state, chunk=size)
        after = weighted_norm(*state)
        assert (after <= before * (1 + 1e-12)).all()
        before = after


def test_bounded_over_128k_tokens_at_every_corner() -> None:
    """float32, checked every 4,096 tokens against the bounds of the module docstring.

    Independent values get a factor of 2 over the root mean square that their bound speaks of. Queries are unit vectors,
    so |y| <= |M|; both bounds grow with T, so those after a piece hold for every read within it.
    """
    total, piece, heads = 131_072, 4096, len(CORNERS)
    rng = torch.Generator().manual_seed(1)
    target = torch.randn(DIM, VALUE_DIM, generator=rng, dtype=torch.float64)
    target = 4 * target / target.norm()
    rows = len(PATTERNS)
    alpha, eta, theta = (gate.expand(rows, -1, -1) for gate in gates(piece))
    weight = torch.tensor(CORNERS, dtype=torch.float64)[:, 0]
    to_memory = (1 + weight**2 / (1 + weight / 2)).sqrt()
    state = None
    with torch.no_grad():
        for start in range(0, total, piece):
            k = keys(start, piece, rng)
            # What a state holds of one value's columns depends on no other column: both kinds side by side.
            v = torch.cat([k @ target, unit(*k.shape[:-1], VALUE_DIM, rng=rng)], dim=-1)
            q = unit(1, piece, 1, DIM, rng=rng)
            q, k, v = (x.float().expand(rows, -1, heads, -1) for x in (q, k, v))
            y, state = miras_scan(q, k, v, alpha, eta, theta, state=state, chunk=16)
            explained, independent = bounds(start + piece, 4.0)
            kinds = (y.split(VALUE_DIM, -1), *(part.split(VALUE_DIM, -1) for part in state))
            for bound, read, *after in zip((explained, 2 * independent), *kinds, strict=True):
                assert (weighted_norm(*after) <= bound * (1 + 1e-4)).all()
                assert (read.double().norm(dim=-1).amax(dim=1) <= to_memory * bound).all()


@pytest.mark.parametrize("pattern", ["distance", "iid"])
def test_the_plain_rule_explodes_on_repeats_at_a_distance(pattern: str) -> None:
    """Momentum .9 with step size 1 is inside [0, 1], yet passes 1e20 within 1,024 tokens: why the model has a range."""
    rng = torch.Generator().manual_seed(2)
    k = keys(0, 1024, rng)[PATTERNS.index(pattern), None]
    v = unit(*k.shape[:-1], VALUE_DIM, rng=rng)
    one = torch.ones(1, 1024, 1, dtype=torch.float64)
    _, (memory, _) = miras_scan(k, k, v, 0 * one, 0.9 * one, one)
    assert memory.norm() > 1e20

    eta, tau = 0.9, MAX_TAU
    _, (memory, _) = miras_scan(k, k, v, 0 * one, eta * one, tau * (1 - eta) ** 2 * one)
    assert memory.norm() < 10
