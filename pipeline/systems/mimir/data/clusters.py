"""Clusters of similar sequences, so that training and what is held out share none."""

from __future__ import annotations

import numpy as np

from pipeline.systems.mimir.data.encode import Words
from pipeline.systems.mimir.data.near import compared, near_pairs

_SHORT, _LONG = 8, 30


def radius(lengths: np.ndarray) -> np.ndarray:
    """Edits within which sequences are of one cluster, by the length of the shorter: 2, as from 8 residues on; 1 below;
    a tenth of 30 residues and more."""
    return np.where(lengths < _SHORT, 1, np.maximum(2, lengths // 10))


def greedy_clusters(words: Words) -> np.ndarray:
    """For each of different sequences, the one that represents its cluster [N] int64.

    Greedy, from the longest to the shortest, those of one length by the alphabet: a sequence joins the first
    representative that is within `radius` of it, or becomes one. Raises UserError without rapidfuzz.
    """
    ranking = sorted(range(len(words.texts)), key=lambda place: (-len(words.texts[place]), words.texts[place]))
    order = np.array(ranking, np.int64)
    ranked = words[order]
    representatives = np.full(len(order), -1, np.int64)
    starts, neighbours = _neighbours(ranked)
    for rank in range(len(order)):
        if representatives[rank] < 0:
            representatives[rank] = rank
            later = neighbours[starts[rank] : starts[rank + 1]]
            representatives[later[representatives[later] < 0]] = rank
    found = np.empty_like(representatives)
    found[order] = order[representatives]
    return found


def _neighbours(words: Words) -> tuple[np.ndarray, np.ndarray]:
    """(starts [N + 1], neighbours): the later sequences within the radius of sequence i are
    neighbours[starts[i] : starts[i + 1]], in their order."""
    lengths = words.lengths
    pairs = [np.empty((0, 3), np.int64)]
    # Pairs of which one is short are within one edit, so the other is little longer.
    for kind, distance in ((lengths <= _SHORT, 1), (lengths >= _SHORT, 2)):
        chosen = np.flatnonzero(kind)
        first, second, edits = near_pairs(words[chosen], distance)
        pairs.append(np.stack([chosen[first], chosen[second], edits], 1))
    long = np.flatnonzero(lengths >= _LONG)
    if len(long):
        for first, second, edits in compared(words[long], int(radius(lengths[long]).max())):
            pairs.append(np.stack([long[first], long[second], edits], 1))
    every = np.concatenate(pairs)
    within = every[:, 2] <= radius(np.minimum(lengths[every[:, 0]], lengths[every[:, 1]]))
    near = np.unique(every[within, :2], axis=0)
    return np.searchsorted(near[:, 0], np.arange(len(lengths) + 1)), near[:, 1]
