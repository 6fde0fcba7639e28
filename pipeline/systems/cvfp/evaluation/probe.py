"""A linear probe: which token stood two places back, read from a context or from the embedding of the token itself.

Multinomial logistic regression, as is usual for probes. Least squares to one-hot classes, which sums over tokens would
give without keeping any, name rare tokens too seldom: of the same contexts they read 31 % where this reads 54 %.
"""

from __future__ import annotations

import math
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
MOST = 1 << 17
"""Training tokens that a probe is fitted to at most, of all ranks: every k-th row where there are more."""
ROWS, UPDATES, PASSES = 4, 600, 3
"""Rows of an update; updates and passes over the rows, of which there are at least so many."""
RATE, PENALTY = 1e-2, 1e-4
"""Learning rate of Adam at the first update, which falls to 0 at the last; weight of |W|^2 / 2."""
FLOOR = 1e-3
"""Added to the variances that features are divided by, as a share of their mean."""
BLOCK = 4096
"""Tokens that are worked on at once."""


@dataclass(frozen=True)
class ProbeResult:
    """Share of held-out tokens whose token two back is read, of `count`, and what always naming the most frequent one
    reads."""

    accuracy: float
    count: int
    most_frequent: float


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
    """From pieces of training rows to logistic regression from features to classes."""

    def __init__(self, width: int, classes: Tensor, device: torch.device, every: int = 1) -> None:
        """every: of so many rows one is kept."""
        self.width, self.classes, self.every = width, classes.to(device), every
        self._features: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._places: dict[int, int] = {}
        """By the number of a row, where its examples stand in both lists."""
        self._last = -1
        """The largest number of a row, kept or not."""

    def add(self, features: Tensor, ids: Tensor, mask: Tensor, numbers: Tensor) -> None:
        """Features [rows, L, D] of tokens ids and mask [rows, L], in rows of these `numbers` [rows], each of which is
        that of one row of all ranks. Of the examples those are kept whose token has a class."""
        for row, number in enumerate(numbers.tolist()):
            self._last = max(self._last, number)
            if number % self.every:
                continue
            found, labels = examples(*(one[row : row + 1] for one in (features, ids, mask)))
            index, known = _index(labels, self.classes)
            self._places[number] = len(self._features)
            self._features.append(found[known].float())
            self._answers.append(index[known])

    def fit(self, topology: Topology) -> Readout:
        """By Adam from zero, of features about their means in directions of variance 1, whose scale then says nothing.
        Every rank makes the same updates, of its rows of each. Consumes what was added. Collective."""
        mean, whiten = self._moments(topology)
        for features in self._features:
            features.copy_((features.double() - mean) @ whiten)
        weights = torch.zeros(self.width + 1, len(self.classes), device=self.classes.device)
        optimizer, batches = torch.optim.Adam([weights], lr=RATE), self._batches(topology)
        for made, numbers in enumerate(batches):
            weights.grad = self._gradient(weights, numbers, topology)
            weights.grad[:-1] += PENALTY * weights[:-1]
            optimizer.param_groups[0]["lr"] = RATE * (1 - made / len(batches))
            optimizer.step()
        weights.grad = None
        self._features.clear()
        linear = whiten @ weights[:-1].double()
        return Readout(linear, weights[-1].double() - mean @ linear, self.classes)

    def _moments(self, topology: Topology) -> tuple[Tensor, Tensor]:
        """The mean [D] of the features of all ranks, and the matrix [D, D] that makes their covariance the identity,
        but for FLOOR; float64."""
        sums = torch.zeros(self.width + 2, self.width, dtype=torch.float64, device=self.classes.device)
        for features in self._features:
            wide = features.double()
            sums[:-2].addmm_(wide.T, wide)
            sums[-2] += wide.sum(0)
            sums[-1] += len(wide)
        count = _added(sums, topology)[-1].clamp_min(1)
        mean = sums[-2] / count
        values, vectors = torch.linalg.eigh(sums[:-2] / count - torch.outer(mean, mean))
        values = values.clamp_min(0)
        return mean, vectors / (values + FLOOR * (values.mean() or 1.0)).sqrt()

    def _batches(self, topology: Topology) -> list[list[int]]:
        """The numbers of the rows of each update: the same on every rank."""
        last = torch.tensor(float(self._last), device=self.classes.device)
        if topology.world > 1:
            dist.all_reduce(last, dist.ReduceOp.MAX)
        numbers = np.arange(0, int(last) + 1, self.every)
        a_pass = max(1, math.ceil(len(numbers) / ROWS))
        draw = np.random.default_rng(0)
        passes = max(PASSES, math.ceil(UPDATES / a_pass))
        return [part.tolist() for _ in range(passes) for part in np.array_split(draw.permutation(numbers), a_pass)]

    def _gradient(self, weights: Tensor, numbers: list[int], topology: Topology) -> Tensor:
        """[D + 1, K], the bias last: of the mean cross-entropy of these rows' examples, of all ranks."""
        mine = [self._places[number] for number in numbers if number in self._places]
        features = torch.cat([self._features[place] for place in mine] or [weights.new_zeros(0, self.width)])
        answers = torch.cat([self._answers[place] for place in mine] or [self.classes[:0]])
        errors = torch.addmm(weights[-1], features, weights[:-1]).softmax(-1)
        errors[torch.arange(len(answers)), answers] -= 1
        # The number of examples stands behind the gradient, for one reduction.
        found = torch.cat([features.T @ errors, errors.sum(0)[None], torch.full_like(weights[:1], len(answers))])
        _added(found, topology)
        return found[:-1] / found[-1].clamp_min(1)


class Readout:
    """A fitted probe, which counts its right answers on pieces of held-out rows: the class with the highest value is
    the answer."""

    def __init__(self, weights: Tensor, bias: Tensor, classes: Tensor) -> None:
        """From weights [D, K], bias [K], float64, and the ids of the classes [K]."""
        self.weights, self.bias, self.classes = weights, bias, classes
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
        return ProbeResult(hits / total, int(count), frequent / total)


def _added(tensor: Tensor, topology: Topology) -> Tensor:
    if topology.world > 1:
        dist.all_reduce(tensor)
    return tensor


def _index(labels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each label [N], and whether it has one."""
    places, order = classes.sort()
    found = torch.searchsorted(places, labels).clamp_max(len(places) - 1)
    return order[found], places[found] == labels
