"""Held-out peptides with what of them belongs together, which intervals are over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.systems.mimir.data.clusters import greedy_clusters
from pipeline.systems.mimir.data.encode import decode, words_of
from pipeline.systems.mimir.peptides import Peptides, chosen, some_rows

CLUSTERS, TARGETS = "clusters of peptides", "targets"


@dataclass(frozen=True)
class HeldOut:
    """Peptides, and the number of the group of each [N] int64: those of a group are no independent ones. `over`: what
    the groups are, CLUSTERS or TARGETS."""

    peptides: Peptides
    groups: np.ndarray
    over: str

    def __len__(self) -> int:
        return len(self.peptides)

    def __getitem__(self, rows: np.ndarray) -> HeldOut:
        """Those at indices, or of a mask."""
        return HeldOut(chosen(self.peptides, rows), self.groups[rows], self.over)

    def some(self, count: int) -> HeldOut:
        """`count` of them at random, in their order; all where there are no more."""
        return self[some_rows(len(self), count)]


def by_cluster(peptides: Peptides, letters: str) -> HeldOut:
    """With clusters of similar sequences as groups, which are those that the data was split by where it is whole
    clusters. Raises UserError without rapidfuzz."""
    texts, members = np.unique(decode(peptides.letters, peptides.lengths, letters), return_inverse=True)
    words = words_of(pa.array(texts.tolist(), pa.string()))
    return HeldOut(peptides, greedy_clusters(words)[members.reshape(-1)], CLUSTERS)


def by_target(peptides: Peptides) -> HeldOut:
    """With targets as groups, where these are what training has not seen."""
    return HeldOut(peptides, peptides.targets.astype(np.int64), TARGETS)
