"""The orthogonalisation of Muon."""

from __future__ import annotations

from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic a x + b x^3 + c x^5: steep at 0, so that small singular values rise fast; it ends near 1, not at
it."""


def newton_schulz(matrices: Tensor, steps: int = 5, epsilon: float = 1e-7) -> Tensor:
    """Approximately the nearest matrices with orthonormal rows or columns, whichever are fewer.

    Each step maps the singular values by a quintic and leaves the singular vectors; after five, values above about
    1e-3 of the Frobenius norm lie between about 0.7 and 1.2. The result does not depend on a matrix's scale.

    Args:
        matrices: ``[..., rows, columns]``, float32 or float64.
        steps: quintic steps, 1 or more.
        epsilon: floor of the Frobenius norm, so that zeros stay zeros.

    Returns:
        Matrices of the same shape and dtype, differentiable.

    Raises:
        ValueError: fewer than two dimensions, or steps below 1.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), whose coefficients
    these are.
    """
    if matrices.dim() < 2:
        raise ValueError(f"matrices has shape {list(matrices.shape)}; expected [..., rows, columns]")
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected 1 or more")
    a, b, c = COEFFICIENTS
    # The Gram matrix of the shorter side is the smaller one.
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / ((x * x).sum(dim=(-2, -1), keepdim=True) + epsilon**2).sqrt()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
