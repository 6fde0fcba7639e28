"""Documents that can be read in any order: the hold-out and the seeded permutation of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from pipeline.data.sources.base import Document, Order, Permutation, Place, held_out_rows, row_hashes
from pipeline.errors import UserError


class RandomAccess(Protocol):
    """Documents by index, in a fixed natural order."""

    name: str
    groups: np.ndarray | None
    """Boundaries [groups + 1] of runs that are cheap to read together (parquet row groups); None: all are alike."""
    groups_per_shuffle: int
    """How many of these runs are shuffled, and so read, at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def parts(self) -> Iterable[tuple[str, int]]:
        """(identity, rows) of each file, in natural order."""
        ...


class IndexedDocuments:
    """One side of the hold-out of a random-access source; memory grows with the held-out documents alone."""

    def __init__(self, source: RandomAccess, order: Order) -> None:
        self._source, self._order = source, order
        self._held = held_out_rows(source.parts(), order.holdout)
        if order.holdout and not 0 < len(self._held) < len(source):
            raise UserError(_empty_side(source, len(self._held)))
        # The k-th training document is k plus the held-out ones before it, so only the smaller side is stored.
        self._before = self._held - np.arange(len(self._held))
        self._size = len(self._held) if order.held_out else len(source) - len(self._held)
        self._permute = lru_cache(maxsize=4)(self._permutation)

    def count(self) -> int:
        return self._size

    def read(self, epoch: int, position: int) -> Document | None:
        if position >= self._size:
            return None
        rank = self._permute(epoch)(position) if self._order.shuffle else position
        return self._source[self._select(rank)]

    def scan(self) -> Iterator[Document]:
        return (self._source[self._select(rank)] for rank in range(self._size))

    def hint(self, epoch: int, position: int) -> dict[str, Any] | None:
        return None

    def seek(self, places: dict[int, Place]) -> None:
        pass

    def _select(self, rank: int) -> int:
        if self._order.held_out:
            return int(self._held[rank])
        return rank + int(np.searchsorted(self._before, rank, side="right"))

    def _permutation(self, epoch: int) -> Callable[[int], int]:
        groups = self._source.groups
        if groups is None:
            return Permutation(self._size, self._order.seed, epoch)
        ranks = np.searchsorted(self._held, groups)
        if not self._order.held_out:
            ranks = groups - ranks
        return _GroupedPermutation(ranks, self._source.groups_per_shuffle, self._order.seed, epoch)


class _GroupedPermutation:
    """Shuffles the groups, then the documents of a few groups together, so that a group is read about once an epoch."""

    def __init__(self, boundaries: np.ndarray, groups_per_shuffle: int, *key: object) -> None:
        self._key = key
        count = len(boundaries) - 1
        shuffled = Permutation(count, "groups", *key)
        groups = np.fromiter((shuffled(i) for i in range(count)), np.int64, count)
        self._starts = boundaries[:-1][groups]
        self._ends = np.cumsum(np.diff(boundaries)[groups])
        ends = self._ends[groups_per_shuffle - 1 : -1 : groups_per_shuffle]
        self._chunk_ends = np.append(ends, self._ends[-1])
        self._chunk = lru_cache(maxsize=16)(self._permute_chunk)

    def _permute_chunk(self, chunk: int) -> Permutation:
        size = int(self._chunk_ends[chunk]) - self._chunk_start(chunk)
        return Permutation(size, "rows", chunk, *self._key)

    def _chunk_start(self, chunk: int) -> int:
        return int(self._chunk_ends[chunk - 1]) if chunk else 0

    def __call__(self, position: int) -> int:
        chunk = int(np.searchsorted(self._chunk_ends, position, side="right"))
        start = self._chunk_start(chunk)
        place = start + self._chunk(chunk)(position - start)
        group = int(np.searchsorted(self._ends, place, side="right"))
        return int(self._starts[group]) + place - (int(self._ends[group - 1]) if group else 0)


def _empty_side(source: RandomAccess, held: int) -> str:
    if len(source) == 1:
        return f"{source.name} holds a single document, which --data.holdout cannot divide: give more documents"
    hashes = np.concatenate([row_hashes(identity, 0, rows) for identity, rows in source.parts()])
    smallest, largest = float(hashes.min()) / 2.0**64, float(hashes.max()) / 2.0**64
    if held:
        most = math.floor(largest * 1e4) / 1e4
        return f"--data.holdout leaves no document of {source.name} to train on: lower it to {most:g} or less"
    enough = math.ceil(smallest * 1e4 + 1) / 1e4
    return f"--data.holdout keeps none of the {len(source)} documents of {source.name}: raise it to {enough:g} or more"
