"""Which peptides are for training, and which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data.sources.base import digest, hold_out_threshold
from pipeline.systems.mimir.data.clusters import greedy_clusters
from pipeline.systems.mimir.data.encode import Words, words_of
from pipeline.systems.mimir.data.near import is_near
from pipeline.systems.mimir.peptides import INTERACTING

TRAINING, HELD_OUT, HELD_OUT_TARGET, LEFT_OUT = range(4)
"""What a row is for; one that is left out is for nothing."""
APART = 2
"""Edits by which training differs at least, and one more, from every interacting peptide that is held out."""
BACKGROUND_APART = ((8, APART), (6, 1))
"""(residues, edits) of the background: of peptides that both have so many residues, training keeps none within so many
edits of one that is held out. Of shorter ones only equal ones: a large set has most that there are."""


@dataclass(frozen=True)
class Split:
    """What each row of a table is for [N] int8, and the rows that are left out, by why."""

    parts: np.ndarray
    left_out: dict[str, int]


def split(
    sequences: pa.StringArray, labels: np.ndarray, targets: np.ndarray, names: Sequence[str], holdout: float
) -> Split:
    """Divides rows [N] with their labels and targets (indices of `names`, or `NO_TARGET`); a function of the rows and
    of the share `holdout` alone, whatever the order of the rows.

    Of the targets, about a share `holdout` is held out, one at least, with all their peptides; of the clusters of
    interacting peptides, each with that probability; of the background, each peptide with that probability. Which ones,
    hashes decide. Left out are: copies of a row; background that interacts as well; of training what is within `APART`
    edits of an interacting peptide that is held out; and of its background what is as near to background that is held
    out as `BACKGROUND_APART` says. Raises UserError without rapidfuzz.
    """
    encoded = sequences.dictionary_encode()
    words, unique = words_of(encoded.dictionary), encoded.indices.to_numpy().astype(np.int64)
    interacting = labels == INTERACTING
    parts = np.full(len(labels), TRAINING, np.int8)
    left_out: dict[str, int] = {}

    def leave_out(rows: np.ndarray, why: str) -> None:
        rows = rows & (parts != LEFT_OUT)
        parts[rows] = LEFT_OUT
        if rows.any():
            left_out[why] = int(rows.sum())

    leave_out(_copies(unique, labels, targets), "copies")
    does_interact = _present(unique[interacting], len(words.texts))
    leave_out(~interacting & does_interact[unique], "background that interacts as well")
    if holdout <= 0:
        return Split(parts, left_out)
    kept = parts == TRAINING
    background = np.flatnonzero(kept & ~interacting)
    parts[background[_chosen("background", [words.texts[place] for place in unique[background].tolist()], holdout)]] = (
        HELD_OUT
    )
    parts[kept & interacting & _held_out_clusters(words, does_interact, holdout)[unique]] = HELD_OUT
    parts[kept & np.isin(targets, _held_out_targets(targets[interacting], names, holdout))] = HELD_OUT_TARGET

    def near(trained: np.ndarray, held_out: np.ndarray, distance: int, least: int = 0) -> np.ndarray:
        """Which of the rows `trained` are so near to one of the rows `held_out`; of `least` residues or more."""
        some, others = (
            np.flatnonzero(_present(unique[rows], len(words.texts)) & (words.lengths >= least))
            for rows in (trained, held_out)
        )
        found = np.zeros(len(words.texts), bool)
        found[some] = is_near(words[some], words[others], distance)
        return trained & found[unique]

    apart = near(parts == TRAINING, interacting & np.isin(parts, (HELD_OUT, HELD_OUT_TARGET)), APART)
    for label, kind in ((interacting, "interacting"), (~interacting, "background")):
        leave_out(label & apart, f"{kind} within {APART} edits of interacting peptides that are held out")
    for least, edits in BACKGROUND_APART:
        rows = near(~interacting & (parts == TRAINING), ~interacting & (parts == HELD_OUT), edits, least)
        leave_out(rows, f"background of {least} residues or more within {edits} edits of background that is held out")
    unknown = ~np.isin(targets, targets[parts == TRAINING]) & (targets >= 0)
    parts[unknown & (parts == HELD_OUT)] = HELD_OUT_TARGET
    return Split(parts, left_out)


def _present(numbers: np.ndarray, count: int) -> np.ndarray:
    """Which of range(count) are among `numbers` [count] bool."""
    found = np.zeros(count, bool)
    found[numbers] = True
    return found


def _copies(unique: np.ndarray, labels: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Whether a row like this one stands before it [N] bool."""
    order = np.lexsort((targets, labels, unique))
    same = np.arange(len(order)) > 0
    for column in (unique, labels, targets):
        same[1:] &= column[order[1:]] == column[order[:-1]]
    copies = np.empty(len(order), bool)
    copies[order] = same
    return copies


def _held_out_targets(targets: np.ndarray, names: Sequence[str], holdout: float) -> list[int]:
    """Those with the smallest hashes of their names; none where there is only one target or none."""
    present = np.unique(targets[targets >= 0]).tolist()
    if len(present) < 2:
        return []
    present.sort(key=lambda target: digest("target", names[target]))
    return present[: min(len(present) - 1, max(1, round(holdout * len(present))))]


def _held_out_clusters(words: Words, interacting: np.ndarray, holdout: float) -> np.ndarray:
    """Whether each of the different sequences is of a cluster of interacting ones that is held out [sequences] bool."""
    places = np.flatnonzero(interacting)
    clusters = words[places]
    represented = greedy_clusters(clusters)
    heads = np.unique(represented)
    held = np.zeros(len(places), bool)
    held[heads[_chosen("cluster", [clusters.texts[head] for head in heads.tolist()], holdout)]] = True
    found = np.zeros(len(words.texts), bool)
    found[places] = held[represented]
    return found


def _chosen(kind: str, texts: Sequence[str], holdout: float) -> np.ndarray:
    """Whether each is held out [N] bool: those with small hashes; of several, one at least."""
    hashes = np.array([digest(kind, text) for text in texts], np.uint64)
    chosen = hashes < np.uint64(hold_out_threshold(holdout))
    if len(texts) > 1:
        chosen[np.argmin(hashes)] = True
    return chosen
