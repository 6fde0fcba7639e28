"""Random arguments of the memory step, and what the float64 token loop makes of them."""

from __future__ import annotations

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
    tokens = [z.unsqueeze(1) for z in (x["q"], x["k"], x["v"], alpha, eta, x["theta"])]  # type: ignore[union-attr]
    y, after = token_loop(*tokens, state=(x["memory"], x["momentum"]))  # type: ignore[arg-type]
    return [y.squeeze(1), *after]


def error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


def assert_close(actual: list[Tensor], wanted: list[Tensor], read: float = FP32, state: float = FP32) -> None:
    for name, a, b, bound in zip(("y", "M", "S"), actual, wanted, (read, state, state), strict=True):
        assert a.shape == b.shape and error(a, b) < bound, f"{name}: {error(a, b):.1e}"
