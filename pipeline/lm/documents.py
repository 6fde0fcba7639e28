"""Sums by held-out document and bin, and intervals over documents.

Tokens of one document depend on each other, so a document, not a token, is what an evaluation has many of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.parallel.collectives import all_gather_object
from pipeline.parallel.topology import Topology

RESAMPLES = 1000
BLOCK = 50
"""Resamples that are drawn at once."""
LEVEL = 0.95
"""Share of resamples that an interval holds."""


class DocumentSums:
    """Named sums per document and bin, float64, of this rank's tokens until `gather`."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self._parts: list[tuple[str, Tensor, Tensor]] = []

    def add(
        self, streams: Tensor, segments: Tensor, bins: Tensor, counted: Tensor, values: Mapping[str, Tensor]
    ) -> None:
        """Adds values [rows, T] of the tokens in `counted` [rows, T] to their bins [rows, T].

        A document is a segment [rows, T] of a stream [rows].
        """
        keys, documents = ((streams[:, None] << 32) + segments)[counted].unique(return_inverse=True)
        index = documents * self.bins + bins.clamp(0, self.bins - 1)[counted]
        for name, value in values.items():
            sums = torch.zeros(keys.numel() * self.bins, dtype=torch.float64, device=value.device)
            sums.index_add_(0, index, value[counted].double())
            self._parts.append((name, keys.cpu(), sums.view(-1, self.bins).cpu()))

    def gather(self, topology: Topology) -> dict[str, Tensor]:
        """The sums of all ranks by name, each [documents, bins], the same on every rank. Collective."""
        parts = [part for parts in all_gather_object(topology, self._parts) for part in parts]
        if not parts:
            return {}
        documents = torch.cat([keys for _, keys, _ in parts]).unique()
        found: dict[str, Tensor] = {}
        for name, keys, sums in parts:
            total = found.setdefault(name, torch.zeros(documents.numel(), self.bins, dtype=torch.float64))
            total.index_add_(0, torch.searchsorted(documents, keys), sums)
        return found


def documents_per_bin(labels: Tensor) -> tuple[int, ...]:
    """Documents with a label in each bin, of labels [documents, bins]."""
    return tuple((labels > 0).sum(0).tolist())


def interval(
    sums: Mapping[str, Tensor], statistic: Callable[[Mapping[str, Tensor]], Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lower and upper ends of a bootstrap interval over documents, per bin; NaN below two documents.

    `sums`: [documents, bins] each, "labels" among them. `statistic`: the value per bin of sums over documents,
    [resamples, bins] each. The interval is that of percentiles: of a handful of documents it is too narrow.
    """
    (count, bins), generator = sums["labels"].shape, torch.Generator().manual_seed(0)
    few = (sums["labels"] > 0).sum(0) < 2
    if few.all():
        return (math.nan,) * bins, (math.nan,) * bins
    found = []
    for _ in range(RESAMPLES // BLOCK):
        chosen = torch.randint(count, (BLOCK, count), generator=generator)
        weights = torch.zeros(BLOCK, count, dtype=torch.float64)
        weights.scatter_add_(1, chosen, torch.ones_like(weights))
        found.append(statistic({name: weights @ value for name, value in sums.items()}))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.cat(found).nanquantile(ends, dim=0)
    return tuple(low.masked_fill(few, torch.nan).tolist()), tuple(high.masked_fill(few, torch.nan).tolist())
