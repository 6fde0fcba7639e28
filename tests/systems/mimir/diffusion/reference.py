"""The D3PM with uniform transitions by products of matrices, in float64: what the closed form is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Reverse = Callable[[np.ndarray, int, int, int], np.ndarray]
"""A form of the reverse step: of a prediction [b, a], T, s and t, p(x_s = j | x_t = b), [b, j]."""

RESIDUES = "ARNDCQEGHILKMFPSTWYV"
PERCENT = (
    8.25, 5.53, 4.06, 5.46, 1.38, 3.93, 6.72, 7.07, 2.27, 5.91, 9.65, 5.80, 2.41, 3.86, 4.74, 6.65, 5.36, 1.10, 2.92,
    6.86,
)  # fmt: skip
"""Composition of Swiss-Prot, in the order of RESIDUES."""


def swiss_prot(K: int = 25) -> np.ndarray:
    """Its composition over an alphabet of K, of which all but 20 never occur: [K], an entropy of 2.889 nats."""
    return np.append(PERCENT, np.zeros(K - len(PERCENT))) / sum(PERCENT)


def transitions(T: int, K: int) -> np.ndarray:
    """Q_t for t = 0..T, [T + 1, K, K]; row: from, column: to. Q_0 is the identity."""
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) for t in range(T + 1)]
    betas = [0.0] + [min(1 - f[t] / f[t - 1], 0.999) for t in range(1, T + 1)]
    return np.stack([(1 - beta) * np.eye(K) + beta / K * np.ones((K, K)) for beta in betas])


def between(T: int, K: int, s: int, t: int) -> np.ndarray:
    """The product Q_(s+1) ... Q_t, [K, K]."""
    product = np.eye(K)
    for step in transitions(T, K)[s + 1 : t + 1]:
        product = product @ step
    return product


def posterior(T: int, K: int, s: int, t: int) -> np.ndarray:
    """q(x_s = j | x_t = b, x_0 = a), [a, b, j]: Bayes' rule on the matrices."""
    before, step, total = between(T, K, 0, s), between(T, K, s, t), between(T, K, 0, t)
    return before[:, None, :] * step.T[None] / total[:, :, None]


def mixture(p: np.ndarray, T: int, s: int, t: int) -> np.ndarray:
    """p(x_s = j | x_t = b), [b, j], of a prediction p(x_0 = a | x_t = b), [b, a]: the mean posterior."""
    return np.einsum("ba,abj->bj", p, posterior(T, p.shape[1], s, t))


def joint_form(p: np.ndarray, T: int, s: int, t: int) -> np.ndarray:
    """The paper's form, [b, j]: the prediction is put in the place of x_0, and the product normalised, but at s = 0,
    which is the prediction itself. Wrong for the p of cross-entropy."""
    step = between(T, p.shape[1], s, t)
    if s == 0:
        return p
    unnormalised = step.T * (p @ between(T, p.shape[1], 0, s))
    return unnormalised / unnormalised.sum(-1, keepdims=True)


def exact_prediction(f: np.ndarray, T: int, t: int) -> np.ndarray:
    """p(x_0 = a | x_t = b), [b, a], of a residue with the frequencies f."""
    joint = f[:, None] * between(T, len(f), 0, t)
    return (joint / joint.sum(0)).T


def divergence(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """KL(q || p) over the last axis."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(q > 0, q * np.log(q / p), 0.0).sum(-1)


def chain(f: np.ndarray, T: int, reverse: Reverse) -> np.ndarray:
    """The distribution of a residue that the whole reverse process makes with the exact prediction, [K]."""
    x = np.full(len(f), 1 / len(f))
    for t in range(T, 0, -1):
        x = x @ reverse(exact_prediction(f, T, t), T, t - 1, t)
    return x


def bound(f: np.ndarray, T: int, reverse: Reverse) -> float:
    """The variational bound of a residue with the frequencies f under the exact prediction and a form of the reverse
    step, nats: prior, the steps and the reconstruction."""
    K = len(f)
    total = float(f @ divergence(between(T, K, 0, T), np.full(K, 1 / K)))
    for t in range(1, T + 1):
        steps = divergence(posterior(T, K, t - 1, t), reverse(exact_prediction(f, T, t), T, t - 1, t)[None])
        total += float((f[:, None] * between(T, K, 0, t))[f > 0].ravel() @ steps[f > 0].ravel())
    return total
