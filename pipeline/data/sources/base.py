"""What a source of documents is, and the seeded order in which streams visit its documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Document:
    """A document and the name that messages give it."""

    name: str
    text: str
    problem: str | None = None
    """Why the record is no text, in words that begin with its file and row; None where it is one."""
    undecodable: bool = False
    """Whether bytes or half surrogate pairs that are no text are read as U+FFFD."""


@dataclass(frozen=True)
class Order:
    """Which documents are read, in which order, and for which streams.

    The documents of an epoch are numbered by `position`, and stream i takes those with
    (position + epoch) % streams == i. So a document goes to one stream per epoch, and the rotation gives every stream
    something even where documents are fewer than streams.
    """

    streams: int
    """Streams of the whole run (the global batch)."""
    local_streams: range
    """Streams that this data rank reads."""
    held_out: bool
    holdout: float
    """Share of the documents that is held out; 0: none, in a corpus that is all for one purpose."""
    shuffle: bool
    seed: int

    def stream(self, epoch: int, position: int) -> int:
        """The stream that the document at `position` of `epoch` belongs to."""
        return (position + epoch) % self.streams

    def first(self, stream: int, epoch: int) -> int:
        """Position of the first document of `stream` in `epoch`, which may lie beyond the epoch's end."""
        return (stream - epoch) % self.streams


@dataclass(frozen=True)
class Place:
    """The position of a stream: the document it reads, and what its source may need to find that again."""

    epoch: int
    position: int
    hint: dict[str, Any] | None = None


class Documents(Protocol):
    """The documents of one side of the hold-out, in an `Order`."""

    def read(self, epoch: int, position: int) -> Document | None:
        """The document at `position`, or None beyond the epoch's end. A stream asks with rising (epoch, position)."""
        ...

    def count(self) -> int | None:
        """Documents in an epoch; None where that shows only at its end."""
        ...

    def scan(self) -> Iterator[Document]:
        """Every document once, apart from what `read` does."""
        ...

    def hint(self, epoch: int, position: int) -> dict[str, Any] | None:
        """JSON that lets `seek` return to a place without reading everything before it."""
        ...

    def seek(self, places: dict[int, Place]) -> None:
        """Takes the places of this rank's streams; the next `read` of each stream is there or later."""
        ...


class Source(Protocol):
    """A corpus: both sides of the hold-out."""

    name: str

    @property
    def remedy(self) -> str:
        """What can be done about a record that cannot be used, for messages."""
        ...

    def open(self, order: Order) -> Documents: ...

    def fingerprint(self) -> dict[str, Any]:
        """Identity and content, JSON-ready; equal fingerprints mean equal documents."""
        ...

    def same_documents(self, saved: dict[str, Any]) -> bool:
        """Whether the fingerprint `saved`, of this version or of one before it, means these documents in this order."""
        ...

    def same_numbering(self, saved: dict[str, Any]) -> bool:
        """Whether every place of an order means the same record as with the fingerprint `saved`, changed or not."""
        ...

    def describe(self) -> str:
        """One line for logs."""
        ...


def digest(*parts: object) -> int:
    """64 bits that depend on `parts` alone, on every machine and in every version."""
    joined = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(joined, digest_size=8).digest(), "big")


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


def _mix_many(words: np.ndarray) -> np.ndarray:
    """`_mix` of each of `words`, uint64."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def row_hashes(identity: str, start: int, stop: int) -> np.ndarray:
    """64-bit hashes [stop - start] of the rows of a file, from its identity and the row numbers."""
    with np.errstate(over="ignore"):
        return _mix_many(np.uint64(digest(identity)) + np.arange(start, stop, dtype=np.uint64) * np.uint64(_GOLDEN))


def hold_out_threshold(holdout: float) -> int:
    """Documents whose 64-bit hash is below this are held out."""
    return min(int(holdout * 2.0**64), _WORD)


def held_out_rows(parts: Iterable[tuple[str, int]], holdout: float) -> np.ndarray:
    """Global indices, sorted, of the held-out rows of files given as (identity, rows)."""
    threshold = hold_out_threshold(holdout)
    found, base = [np.empty(0, np.int64)], 0
    for identity, rows in parts:
        if rows == 1:  # arrays would dominate the time of a folder of small files
            if _mix(digest(identity)) < threshold:
                found.append(np.array([base]))
            base += 1
            continue
        for start in range(0, rows, 1 << 20):
            hashes = row_hashes(identity, start, min(start + (1 << 20), rows))
            found.append(np.flatnonzero(hashes < np.uint64(threshold)) + (base + start))
        base += rows
    return np.concatenate(found)


class Permutation:
    """A seeded permutation of range(size) without a table: a Feistel network, walked until it lands inside."""

    _ROUNDS = 6

    def __init__(self, size: int, *key: object) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        seed = digest("permutation", *key)
        self._keys = tuple(_mix((seed + (i + 1) * _GOLDEN) & _WORD) for i in range(self._ROUNDS))

    def __call__(self, index: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = index >> half, index & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            index = left << half | right
            if index < self.size:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """What calling it gives for each of `indices` [n] uint64, all at once."""
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        found = indices.astype(np.uint64)
        outside = np.ones(found.shape, bool)
        while outside.any():
            walked = found[outside]
            left, right = walked >> half, walked & mask
            for key in self._keys:
                left, right = right, left ^ (_mix_many(right ^ np.uint64(key)) & mask)
            found[outside] = left << half | right
            outside[outside] = found[outside] >= self.size
        return found
