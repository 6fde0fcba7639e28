"""The effective rank of contexts, from their Gram matrix: no rank of the run needs the contexts of another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-10
"""What the prototype adds to a share before it takes the logarithm."""


def singular_values(gram: Tensor) -> Tensor:
    """Singular values [D], largest first, float64, of the matrix C [T, D] whose Gram matrix C^T C [D, D] is given.

    Values below about 1e-8 of the largest one are rounding: the eigenvalues are their squares.
    """
    return torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt().flip(0)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of p = S / sum S, of singular values S that are not squared (Roy and Vetterli, EUSIPCO 2007),
    as the prototype computes it, of contexts from which no mean is taken. 0 of values that are all 0."""
    total = values.double().sum()
    if total <= 0:
        return 0.0
    shares = values.double() / total
    return float(torch.exp(-(shares * torch.log(shares + ROUNDING)).sum()))


def gaussian_values(tokens: int, width: int, seed: int = 0) -> Tensor:
    """Singular values [min(tokens, width)] of a matrix [tokens, width] of independent standard normal numbers.

    Drawn without the matrix: its triangular factor has independent entries, roots of chi-square numbers on the diagonal
    (Bartlett, Proc. Roy. Soc. Edinburgh 53, 1933), so 100K tokens cost no more than `width` of them.
    """
    long, short = max(tokens, width), min(tokens, width)
    generator = np.random.Generator(np.random.PCG64(seed))
    factor = np.tril(generator.standard_normal((short, short)), -1)
    factor[np.diag_indices(short)] = np.sqrt(generator.chisquare(long - np.arange(short)))
    return torch.from_numpy(np.linalg.svd(factor, compute_uv=False))


def gaussian_rank(tokens: int, width: int, seed: int = 0) -> float:
    """Effective rank of independent standard normal contexts: what is the most that so many tokens can show."""
    return effective_rank(gaussian_values(tokens, width, seed)) if tokens else 0.0
