"""Losses of the contexts' second moments, and a sum over tokens that has their gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4
"""Added to the second moments' diagonal: the root and the logarithm of 0 are infinitely steep."""


def diversity_terms(moments: Tensor, kind: str) -> Mapping[str, Tensor]:
    """The parts of the loss of second moments M = E[c c^T] [D, D], which add up to it.

    variance: the mean over dimensions of what a root mean square lacks to 1, from 0 to 1, and the sum of squared
    moments of different dimensions over D, from 0 to D - 1 of contexts with a mean square of 1 (as Bardes et al.,
    VICReg, arXiv 2105.04906). log_det: (tr M - log det M) / D - 1, the loss of James and Stein (1961) for an estimate
    of the identity: 0 for M = 1 and more for any other M, so that larger contexts gain nothing; 8.3 for M = 0, by
    `EPSILON`.

    The moments are about zero, not about the mean: so is the effective rank that is asked for, and a mean then counts
    as one more direction that all contexts share. A covariance would need the mean of the very step: about the mean of
    earlier ones, (c - mu)^T G (c - mu) rewards contexts that all move away from it together, faster and faster.
    """
    width = len(moments)
    if kind == "log_det":
        regular = moments + EPSILON * torch.eye(width, dtype=moments.dtype, device=moments.device)
        return {"log_det": (regular.trace() - torch.linalg.slogdet(regular).logabsdet) / width - 1}
    deviations = (moments.diagonal() + EPSILON).sqrt()
    off_diagonal = moments - torch.diag(moments.diagonal())
    return {"variance": F.relu(1 - deviations).mean(), "covariance": off_diagonal.square().sum() / width}


def diversity_gradient(moments: Tensor, kind: str) -> tuple[Mapping[str, Tensor], Tensor]:
    """The parts, detached, and the symmetric gradient G [D, D] of their sum, all float64."""
    with torch.enable_grad():
        wanted = moments.detach().double().requires_grad_()
        terms = diversity_terms(wanted, kind)
        (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), wanted)
    return {name: value.detach() for name, value in terms.items()}, (gradient + gradient.T) / 2


def separable(contexts: Tensor, gradient: Tensor) -> Tensor:
    """0 for each context [tokens, D], with the gradient of c^T G c: [tokens].

    The mean over tokens has the gradient of the loss of their second moments at which G was taken, since dLambda =
    tr(G dM). Tokens stand apart, so it is the same of any micro-batches and ranks.
    """
    # Not c^T G c itself: its value is of no use, and its backward pass would need a second product.
    slopes = 2 * (contexts.detach() @ gradient.to(contexts.dtype))
    return (slopes * (contexts - contexts.detach())).sum(-1)
