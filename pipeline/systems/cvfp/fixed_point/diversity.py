"""Losses of a covariance, and the sum over tokens that has their gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4
"""Added to variances: the root of none is infinitely steep."""


def diversity_terms(covariance: Tensor, kind: str) -> Mapping[str, Tensor]:
    """The parts of the loss of a covariance [D, D], which add up to it.

    variance: the mean over dimensions of what a standard deviation lacks to 1, and the sum of squared covariances of
    different dimensions over D (Bardes et al., VICReg, arXiv 2105.04906). log_det: minus the log-determinant over D,
    which is 0 for independent dimensions of variance 1.
    """
    width = len(covariance)
    if kind == "log_det":
        regular = covariance + EPSILON * torch.eye(width, dtype=covariance.dtype, device=covariance.device)
        return {"log_det": -torch.linalg.slogdet(regular).logabsdet / width}
    deviations = (covariance.diagonal() + EPSILON).sqrt()
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    return {"variance": F.relu(1 - deviations).mean(), "covariance": off_diagonal.square().sum() / width}


def diversity_gradient(covariance: Tensor, kind: str) -> tuple[Mapping[str, Tensor], Tensor]:
    """The parts, detached, and the symmetric gradient G [D, D] of their sum."""
    with torch.enable_grad():
        wanted = covariance.detach().clone().requires_grad_()
        terms = diversity_terms(wanted, kind)
        (gradient,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), wanted)
    return {name: value.detach() for name, value in terms.items()}, (gradient + gradient.T) / 2


def separable(contexts: Tensor, mean: Tensor, gradient: Tensor) -> Tensor:
    """(c - mu)^T G (c - mu) of each context [tokens, D]: [tokens].

    Its mean over tokens has the gradient of the loss of their covariance at which G was taken: the covariance is that
    of the tokens, so dLambda = tr(G dSigma). Tokens stand apart, so any micro-batches and ranks add up to it.
    """
    deviations = contexts - mean
    return ((deviations @ gradient) * deviations).sum(-1)
