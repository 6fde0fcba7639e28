"""A linear probe: which token stood two places back, read from a context or from the embedding of the token itself.

Fitted by normal equations, which are sums over tokens: no token is kept, and none is read twice.
"""

from __future__ import annotations

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
"""Every fifth row is kept back while the penalty is chosen."""
BLOCK = 4096
"""Tokens that are worked on at once."""


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


def examples(features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] of the tokens of a piece that have another two places back in their row, and its id [N]; of
    features [rows, L, D], ids and mask [rows, L]."""
    kept = mask[:, BACK:]
    return features[:, BACK:][kept], ids[:, : max(0, ids.shape[1] - BACK)][kept]


class Probe:
    """From pieces of training rows to least squares from features to one-hot classes, with a ridge penalty."""

    def __init__(self, width: int, classes: Tensor, device: torch.device) -> None:
        self._fitting, self._tuning = (_Equations(width, classes, device) for _ in range(2))

    def add(self, features: Tensor, ids: Tensor, mask: Tensor, numbers: Tensor) -> None:
        """Features [rows, L, D] of tokens ids and mask [rows, L], in rows of these `numbers` [rows]."""
        tuned = numbers % TUNING == TUNING - 1
        for rows, equations in ((~tuned, self._fitting), (tuned, self._tuning)):
            equations.add(*examples(features[rows], ids[rows], mask[rows]))

    def fit(self, topology: Topology) -> Readout:
        """Of all rows, by the penalty that has the least squared error on every fifth of them when it is fitted to the
        others. Collective."""
        fitting, tuning = self._fitting.reduce(topology), self._tuning.reduce(topology)
        solutions = fitting.solved(RIDGES)
        errors = [tuning.squared_error(*solution) for solution in solutions]
        ridge = RIDGES[int(torch.stack(errors).argmin())]
        whole = fitting + tuning
        ((weights, bias),) = whole.solved((ridge,))
        return Readout(weights, bias, whole.classes, ridge)


class Readout:
    """A fitted probe, which counts its right answers on pieces of held-out rows: the class with the highest value is
    the answer."""

    def __init__(self, weights: Tensor, bias: Tensor, classes: Tensor, ridge: float) -> None:
        """From weights [D, K], bias [K], float64, and the ids of the classes [K]."""
        self.weights, self.bias, self.classes, self.ridge = weights, bias, classes, ridge
        self._counts = torch.zeros(3, dtype=torch.float64, device=weights.device)
        """Right answers, tokens, and those whose token two back is the most frequent class."""

    def score(self, features: Tensor, ids: Tensor, mask: Tensor) -> None:
        """Adds the tokens of a piece, as `Probe.add` has them."""
        every, labels = examples(features, ids, mask)
        index, known = _index(labels, self.classes)
        for first in range(0, len(index), BLOCK):
            block = slice(first, first + BLOCK)
            answers = torch.addmm(self.bias, every[block].double(), self.weights).argmax(-1)
            self._counts[0] += ((answers == index[block]) & known[block]).sum()
        self._counts[1] += len(labels)
        self._counts[2] += (labels == self.classes[0]).sum()

    def result(self, topology: Topology) -> ProbeResult:
        """Of the tokens of all ranks. Collective."""
        hits, count, frequent = _added(self._counts.clone(), topology).tolist()
        total = max(1.0, count)
        return ProbeResult(hits / total, int(count), frequent / total, self.ridge)


def _added(tensor: Tensor, topology: Topology) -> Tensor:
    if topology.world > 1:
        dist.all_reduce(tensor)
    return tensor


class _Equations:
    """Sums over tokens of what least squares need, float64: their number, features, products of these [D, D], and by
    class the number [K] and the features [K, D]. Tokens without a class are in the first three alone."""

    def __init__(self, width: int, classes: Tensor, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.classes = classes.to(device)
        self.tensors = (zeros(), zeros(width), zeros(width, width), zeros(len(classes)), zeros(len(classes), width))

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Features [N, D] and labels [N]."""
        count, total, products, counts, by_class = self.tensors
        count += len(labels)
        index, known = _index(labels, self.classes)
        counts += torch.bincount(index[known], minlength=len(counts))
        for first in range(0, len(labels), BLOCK):
            block = slice(first, first + BLOCK)
            wide, there = features[block].double(), known[block]
            total += wide.sum(0)
            products.addmm_(wide.T, wide)
            by_class.index_add_(0, index[block][there], wide[there])

    def reduce(self, topology: Topology) -> _Equations:
        for tensor in self.tensors:
            _added(tensor, topology)
        return self

    def __add__(self, other: _Equations) -> _Equations:
        both = _Equations(len(self.tensors[1]), self.classes, self.classes.device)
        both.tensors = tuple(map(torch.add, self.tensors, other.tensors))  # type: ignore[assignment]
        return both

    def solved(self, ridges: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
        """Weights [D, K] and bias [K] by penalty: of features and one-hot classes about their means."""
        count, total, products, counts, by_class = self.tensors
        tokens = count.clamp_min(1)
        mean, shares = total / tokens, counts / tokens
        values, vectors = torch.linalg.eigh(products / tokens - torch.outer(mean, mean))
        values = values.clamp_min(0)
        rotated = vectors.T @ (by_class.T / tokens - torch.outer(mean, shares))
        scale = float(values.mean()) or 1.0
        found = []
        for ridge in ridges:
            weights = vectors @ (rotated / (values + ridge * scale)[:, None])
            found.append((weights, shares - mean @ weights))
        return found

    def squared_error(self, weights: Tensor, bias: Tensor) -> Tensor:
        """The sum over tokens of |y - x W - b|^2, less that of |y|^2, which no W changes."""
        count, total, products, counts, by_class = self.tensors
        of_answers = (weights * (products @ weights)).sum() + 2 * (total @ weights) @ bias + count * (bias @ bias)
        return of_answers - 2 * ((weights * by_class.T).sum() + counts @ bias)


def _index(labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each label [N], and whether it has one."""
    places, order = classes.sort()
    found = torch.searchsorted(places, labels).clamp_max(len(places) - 1)
    return order[found], places[found] == labels
