"""Random arguments of the memory step, and what the float64 token loop makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.reference import token_loop

FP32, BF16 = 1e-6, 6e-3
"""Relative RMSE of reads; states are float32 whatever the tokens are."""
NAMES = ("q", "k", "v", "alpha", "eta", "theta", "memory", "momentum")


def make(
    rows: int = 2,
    heads: int = 3,
    key_dim: int = 32,
    value_dim: int = 48,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokens: int = 1,
    momentum: bool = True,
) -> dict[str, Tensor | None]:
    """The arguments by name; tokens and gates of several tokens are [rows, tokens, heads, ...]."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def gate(largest: float) -> Tensor:
        return largest * torch.rand(rows, tokens, heads, generator=rng, dtype=torch.float64)

    size = (rows, tokens, heads)
    q, k = (F.normalize(normal(*size, key_dim), dim=-1).to(dtype) for _ in range(2))
    v = normal(*size, value_dim).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gates = [x.to(wide) for x in (gate(1.0), gate(0.95), gate(0.9))]
    states = [normal(rows, heads, key_dim, value_dim).to(wide) for _ in range(2)]
    given = [q, k, v, *gates] if tokens > 1 else [x.squeeze(1) for x in (q, k, v, *gates)]
    made: dict[str, Tensor | None] = dict(zip(NAMES, (*given, *states), strict=True))
    return made if momentum else made | {"eta": None}


def expected(x: dict[str, Tensor | None]) -> list[Tensor]:
    """By the token loop in float64."""
    alpha = x["alpha"]
    assert alpha is not None
    eta = torch.zeros_like(alpha) if x["eta"] is None else x["eta"]
    tokens = [z.unsqueeze(1) for z in (x["q"], x["k"], x["v"], alpha, eta, x["theta"])]
    y, after = token_loop(*tokens, state=(x["memory"], x["momentum"]))
    return [y.squeeze(1), *after]


def error(actual: Tensor, wanted: Tensor, size: float = 0.0) -> float:
    """Relative to what is wanted, or to `size` where that is more."""
    return float((actual.double() - wanted).norm()) / max(float(wanted.norm()), size)


def summands(x: dict[str, Tensor | None], wanted: list[Tensor]) -> list[float]:
    """Sizes of what a step of one token adds up for y, M and S, as of independent numbers: where these nearly cancel,
    as they may in results of one number, rounding is a part of them and not of the result."""
    q, alpha, eta, memory, momentum = (
        torch.zeros(1) if z is None else z.double() for z in (x[n] for n in ("q", "alpha", "eta", "memory", "momentum"))
    )
    kept, step = (1 - alpha)[..., None, None] * memory, wanted[2] - eta[..., None, None] * momentum
    squares = kept**2 + wanted[2] ** 2
    read = (q[..., None] ** 2 * squares).sum()
    before = eta[..., None, None] * momentum
    return [float(total.sqrt()) for total in (read, squares.sum(), (before**2 + step**2).sum())]


def assert_close(
    actual: list[Tensor],
    wanted: list[Tensor],
    read: float = FP32,
    state: float = FP32,
    sizes: Sequence[float] = (0.0, 0.0, 0.0),
) -> None:
    for name, a, b, bound, size in zip(("y", "M", "S"), actual, wanted, (read, state, state), sizes, strict=True):
        assert a.shape == b.shape and error(a, b, size) < bound, f"{name}: {error(a, b, size):.1e}"
