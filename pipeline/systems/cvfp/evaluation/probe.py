"""A linear probe: which token stood two places back, read from a context or from the embedding of the token itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology

BACK = 2
"""How far back the token stands that is asked for."""
CLASSES = 2048
"""Tokens that the probe can name, the most frequent ones; the others count as misread."""
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)
"""Penalties that are tried, as shares of the mean eigenvalue of the features' covariance."""
TUNING = 5
"""Every fifth row of the fitted ones is kept back to choose the penalty."""
BLOCK = 4096
"""Tokens that are scored at once."""


@dataclass(frozen=True)
class Examples:
    """Features [N, D] of this rank's tokens, and the token that stood two places back of each [N]."""

    features: Tensor
    labels: Tensor

    @classmethod
    def of(cls, features: Sequence[Tensor], ids: Sequence[Tensor], masks: Sequence[Tensor]) -> Examples:
        """Of pieces: features [rows, L, D], ids and mask [rows, L] each; the first two tokens of a row have none."""
        kept = [mask[:, BACK:] for mask in masks]
        found = [one[:, BACK:][mask] for one, mask in zip(features, kept, strict=True)]
        labels = [one[:, : max(0, one.shape[1] - BACK)][mask] for one, mask in zip(ids, kept, strict=True)]
        return cls(torch.cat(found).float(), torch.cat(labels))


@dataclass(frozen=True)
class ProbeResult:
    """Share of held-out tokens whose token two back is read, of `count`, and what always naming the most frequent one
    reads."""

    accuracy: float
    count: int
    most_frequent: float
    ridge: float


def classes_of(tokens: np.ndarray, most: int = CLASSES) -> Tensor:
    """The most frequent tokens, the most frequent first: the same on every rank, which has all tokens."""
    counts = np.bincount(tokens)
    return torch.from_numpy(np.argsort(-counts, kind="stable")[: min(most, int((counts > 0).sum()))].copy())


def fit_and_score(
    fitting: Examples, tuning: Examples, held_out: Examples, classes: Tensor, topology: Topology
) -> ProbeResult:
    """Least squares from features to one-hot classes with a ridge penalty, in closed form; the class with the highest
    value is the answer. The penalty is that with the most right answers on `tuning`. Collective."""
    sums = _Sums.of(fitting, classes).reduce(topology)
    values, vectors = torch.linalg.eigh(sums.covariance)
    rotated = vectors.T @ sums.cross
    scale = float(values.clamp_min(0).mean()) or 1.0

    def weights(ridge: float) -> Tensor:
        return (vectors @ (rotated / (values.clamp_min(0) + ridge * scale)[:, None])).float()

    right = [_right(tuning, weights(ridge), sums, classes) for ridge in RIDGES]
    ridge = RIDGES[int(_added(torch.stack(right), topology).argmax())]
    hits = _right(held_out, weights(ridge), sums, classes)
    frequent = (held_out.labels == classes[0].to(held_out.labels.device)).sum().double()
    count = torch.tensor(float(len(held_out.labels)), dtype=torch.float64, device=hits.device)
    hits, frequent, count = _added(torch.stack([hits, frequent, count]), topology).tolist()
    total = max(1.0, count)
    return ProbeResult(hits / total, int(count), frequent / total, ridge)


def _added(tensor: Tensor, topology: Topology) -> Tensor:
    if topology.world > 1:
        dist.all_reduce(tensor)
    return tensor


class _Sums:
    """Sums over all examples, and what follows from them: means, covariance [D, D], cross-covariance [D, K]."""

    def __init__(self, count: Tensor, total: Tensor, squares: Tensor, cross: Tensor, shares: Tensor) -> None:
        self._tensors = (count, total, squares, cross, shares)

    @classmethod
    def of(cls, examples: Examples, classes: Tensor) -> _Sums:
        features = examples.features.double()
        index, known = _index(examples.labels, classes)
        width, device = features.shape[1], features.device
        cross = torch.zeros(len(classes), width, dtype=torch.float64, device=device)
        cross.index_add_(0, index[known], features[known])
        shares = torch.bincount(index[known], minlength=len(classes)).double()
        count = torch.tensor(float(len(features)), dtype=torch.float64, device=device)
        return cls(count, features.sum(0), features.T @ features, cross, shares)

    def reduce(self, topology: Topology) -> _Sums:
        for tensor in self._tensors:
            _added(tensor, topology)
        return self

    @property
    def count(self) -> Tensor:
        return self._tensors[0].clamp_min(1)

    @property
    def mean(self) -> Tensor:
        return self._tensors[1] / self.count

    @property
    def shares(self) -> Tensor:
        """Of the classes [K]."""
        return self._tensors[4] / self.count

    @property
    def covariance(self) -> Tensor:
        return self._tensors[2] / self.count - torch.outer(self.mean, self.mean)

    @property
    def cross(self) -> Tensor:
        return self._tensors[3].T / self.count - torch.outer(self.mean, self.shares)


def _index(labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each label [N], and whether it has one."""
    classes = classes.to(labels.device)
    places, order = classes.sort()
    found = torch.searchsorted(places, labels).clamp_max(len(places) - 1)
    return order[found], places[found] == labels


def _right(examples: Examples, weights: Tensor, sums: _Sums, classes: Tensor) -> Tensor:
    """Right answers, float64."""
    index, known = _index(examples.labels, classes)
    mean, shares = sums.mean.float(), sums.shares.float()
    right = torch.zeros((), dtype=torch.float64, device=weights.device)
    for first in range(0, len(index), BLOCK):
        block = slice(first, first + BLOCK)
        answers = torch.addmm(shares, examples.features[block] - mean, weights).argmax(-1)
        right += ((answers == index[block]) & known[block]).sum()
    return right
