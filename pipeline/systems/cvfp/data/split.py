"""Which rows are trained on and which are held out: no document, and no row of the same tokens, is on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.sources.base import digest, hold_out_threshold
from pipeline.errors import UserError
from pipeline.systems.cvfp.data.texts import Cut

Rows = list[np.ndarray]


def split(cut: Cut, holdout: float, name: str) -> tuple[Rows, Rows]:
    """Rows to train on, and rows that are held out, of the documents that a hash of their first row says: about the
    share `holdout`, and at least one. Of a single document the rows at its end are held out. Raises UserError."""
    owners = sorted(set(cut.owners))
    if len(cut.rows) < 2:
        raise UserError(f"{name} has {len(cut.rows)} rows of two tokens or more, of which one is held out: give more")
    if len(owners) == 1:
        held = min(max(1, round(holdout * len(cut.rows))), len(cut.rows) - 1)
        return cut.rows[:-held], cut.rows[-held:]
    hashes: dict[int, int] = {}
    for owner, row in zip(cut.owners, cut.rows, strict=True):
        hashes.setdefault(owner, hash_of(row))
    limit = hold_out_threshold(holdout)
    # Documents that begin alike have one hash, and so one side.
    chosen = {owner for owner in owners if hashes[owner] < limit}
    if not chosen:
        least = min(hashes.values())
        chosen = {owner for owner in owners if hashes[owner] == least}
    if len(chosen) == len(owners):
        raise UserError(f"{name}: --data.holdout {holdout} leaves no document to train on: lower it, or give others")
    sides: tuple[Rows, Rows] = ([], [])
    for owner, row in zip(cut.owners, cut.rows, strict=True):
        sides[owner in chosen].append(row)
    return sides


def held_out_beside(training: int, holdout: float) -> int:
    """Rows to hold out beside so many to train on, the share `holdout` of all: one at least."""
    return max(1, round(training * holdout / (1 - holdout)))


def without(rows: Rows, others: Sequence[np.ndarray]) -> Rows:
    """Those rows whose tokens are in none of `others`."""
    known = {hash_of(row) for row in others}
    return [row for row in rows if hash_of(row) not in known]


def hash_of(row: np.ndarray) -> int:
    """64 bits that the tokens of a row decide."""
    return digest(row.astype("<u4").tobytes().hex())
