"""A distribution of short words whose letters depend on each other, and its exact denoiser under masks."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

K, LENGTH, MASK = 3, 3, 3
WORDS = torch.tensor(list(itertools.product(range(K), repeat=LENGTH)))
"""All 27 of them."""
SHARES = torch.softmax(
    1.5 * torch.randn(len(WORDS), generator=torch.Generator().manual_seed(4), dtype=torch.float64), 0
)
ENTROPY = float(torch.special.entr(SHARES).sum())


def exact_denoiser(xt: Tensor) -> Tensor:
    """log p(x_0 at each position | the visible letters), [rows, LENGTH, K] float64."""
    fits = ((xt[:, None] == WORDS) | (xt[:, None] == MASK)).all(-1) * SHARES  # [rows, words]
    by_letter = torch.nn.functional.one_hot(WORDS, K).double()
    return torch.log(torch.einsum("rw,wlk->rlk", fits / fits.sum(-1, keepdim=True), by_letter).clamp(min=1e-300))
