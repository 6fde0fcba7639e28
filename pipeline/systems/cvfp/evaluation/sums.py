"""Sums over contexts, which ranks add up: all measures that need no two contexts side by side."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.evaluation.rank import effective_rank, singular_values

SMALL = 0.01
"""A number of a context counts as zero below it."""


class ContextSums:
    """Sums over contexts [*, D] in float64 on their device."""

    def __init__(self, width: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram, self.sum, self.units = zeros(width, width), zeros(width), zeros(width)
        self.scalars = zeros(4)
        """Number of contexts, sum of norms, numbers below SMALL, sum of cos(context, embedding)."""

    def add(self, contexts: Tensor, embedded: Tensor | None = None) -> None:
        """Adds contexts [N, D], with the embeddings [N, D] of their tokens where these are to be compared."""
        self.__dict__.pop("values", None)
        wide = contexts.double()
        norms = wide.norm(dim=-1)
        units = wide / norms.clamp_min(1e-300)[:, None]
        self.gram.addmm_(wide.T, wide)
        self.sum += wide.sum(0)
        self.units += units.sum(0)
        cosines = torch.zeros((), dtype=torch.float64, device=wide.device)
        if embedded is not None:
            cosines = torch.nn.functional.cosine_similarity(wide, embedded.double(), dim=-1).sum()
        count = torch.tensor(float(len(wide)), dtype=torch.float64, device=wide.device)
        self.scalars += torch.stack([count, norms.sum(), (wide.abs() < SMALL).sum().double(), cosines])

    def reduce(self, topology: Topology) -> ContextSums:
        """The sums of all ranks, in place; each context must have been added on one of them. Collective."""
        self.__dict__.pop("values", None)
        if topology.world > 1:
            for tensor in (self.gram, self.sum, self.units, self.scalars):
                dist.all_reduce(tensor)
        return self

    @property
    def count(self) -> int:
        return int(self.scalars[0])

    @property
    def width(self) -> int:
        return self.sum.numel()

    @cached_property
    def values(self) -> Tensor:
        """Singular values [D] of the contexts, from which no mean is taken."""
        return singular_values(self.gram)

    def effective_rank(self) -> float:
        return effective_rank(self.values)

    @property
    def norm(self) -> float:
        """Mean norm."""
        return float(self.scalars[1]) / max(1, self.count)

    @property
    def sparsity(self) -> float:
        """Share of numbers below SMALL."""
        return float(self.scalars[2]) / max(1, self.count * self.width)

    @property
    def embedding_cosine(self) -> float:
        """Mean cos(context, embedding) of a token."""
        return float(self.scalars[3]) / max(1, self.count)

    @property
    def spread(self) -> float:
        """Root of the mean squared deviation from the mean context."""
        if not self.count:
            return math.nan
        mean = self.sum / self.count
        return math.sqrt(max(0.0, float(self.gram.trace() / self.count - mean @ mean)))

    @property
    def distance(self) -> float:
        """Root of the mean squared distance of two different contexts, over all pairs; at least their mean."""
        return self.spread * math.sqrt(2 * self.count / (self.count - 1)) if self.count > 1 else math.nan

    @property
    def cosine(self) -> float:
        """Mean cosine of two different contexts, over all pairs; contexts of norm 0 count as cosine 0."""
        pairs = self.count * (self.count - 1)
        return (float(self.units @ self.units) - self.count) / pairs if pairs else math.nan
