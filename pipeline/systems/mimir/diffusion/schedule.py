"""How much of a residue is left after each step of noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_per_step(T: int) -> Tensor:
    """alpha_t = 1 - beta_t for t = 0..T, [T + 1] float64, 1 at t = 0: the share that step t leaves alone.

    beta_t = min(1 - f(t/T) / f((t-1)/T), 0.999), f(u) = cos((u + 0.008) / 1.008 * pi / 2), not squared.
    """
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) for t in range(T + 1)]
    return torch.tensor([1.0] + [max(f[t] / f[t - 1], 0.001) for t in range(1, T + 1)], dtype=torch.float64)


def kept(T: int) -> Tensor:
    """The share that is left alone by steps 1..t, the product of alpha, for t = 0..T: [T + 1] float64."""
    return kept_per_step(T).cumprod(0)
