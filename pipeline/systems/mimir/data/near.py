"""Which sequences are a few edits apart, of sets too large to compare each with each.

Two sequences within d edits become equal when at most d residues are deleted from each. So sequences are first joined
by hashes of what is left of them when up to d residues are deleted, one length of what is left at a time; the edit
distance (Levenshtein's, of rapidfuzz) of the few pairs that meet decides. Nothing is missed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np

from pipeline.errors import UserError
from pipeline.systems.mimir.data.encode import Words

_BLOCK = 1 << 22
"""Hashes, or pairs, that are held at a time."""
_SHORT = 6
"""Of shorter sequences so little is left that most would meet: they are compared each with each."""
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def near_pairs(words: Words, distance: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, edits), each [pairs]: all pairs i < j of different sequences that are `distance` (1 or 2) edits apart or
    fewer. Raises UserError without rapidfuzz."""
    found = [np.empty((0, 3), np.int64)]
    for left in range(int(words.lengths.max(initial=0)) + 1):
        entries = sum(
            np.count_nonzero(words.lengths == left + cut) * _ways(left + cut, cut) for cut in range(distance + 1)
        )
        parts = -(-entries // _BLOCK) if entries else 0
        for part in range(parts):
            hashes, owners = _gathered(words, left, distance, part, parts)
            for first, second in _meeting(hashes, owners):
                edits = _distances(words.texts, first, words.texts, second, distance)
                near = edits <= distance
                found.append(np.stack([first[near], second[near], edits[near]], 1))
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[:, 0], pairs[:, 1], pairs[:, 2]


def is_near(words: Words, others: Words, distance: int) -> np.ndarray:
    """Whether each sequence is within `distance` (1 or 2) edits of any of `others` [N] bool. Raises UserError without
    rapidfuzz."""
    near = np.zeros(len(words.texts), bool)
    if not len(others.texts):
        return near
    _compare_short(words, others, distance, near)
    for left in range(max(1, _SHORT - distance), int(words.lengths.max(initial=0)) + 1):
        known, owners = _gathered(others, left, distance, 0, 1)
        if not len(known):
            continue
        table = _Table(known, owners)
        for cut in range(distance + 1):
            rows = np.flatnonzero((words.lengths == left + cut) & ~near)
            step = max(1, _BLOCK // _ways(left + cut, cut))
            for start in range(0, len(rows), step):
                _mark_near(words, rows[start : start + step], left, table, others, distance, near)
    return near


def _compare_short(words: Words, others: Words, distance: int, near: np.ndarray) -> None:
    """Marks what is near where one of the two is short."""
    cdist, levenshtein = _rapidfuzz().cdist, _levenshtein()
    for length in range(1, _SHORT + distance):
        rows = np.flatnonzero(words.lengths == length)
        reach = np.abs(others.lengths - length) <= distance
        if length >= _SHORT:
            reach &= others.lengths < _SHORT
        texts = [others.texts[place] for place in np.flatnonzero(reach)]
        step = max(1, _BLOCK // max(1, len(texts)))
        for start in range(0, len(rows) if texts else 0, step):
            chosen = rows[start : start + step]
            edits = cdist(
                [words.texts[row] for row in chosen], texts, scorer=levenshtein, score_cutoff=distance, dtype=np.uint8
            )
            near[chosen] = (edits <= distance).any(1)


def _mark_near(
    words: Words, rows: np.ndarray, left: int, table: _Table, others: Words, distance: int,
    near: np.ndarray,
) -> None:  # fmt: skip
    """Marks those of `rows`, all of one length, that are near one of `others`."""
    cut = int(words.lengths[rows[0]]) - left
    for column in _shortened(words.letters[rows, : left + cut], cut):
        maybe = np.flatnonzero(table.may_have(column) & ~near[rows])
        starts, stops = table.ranges(column[maybe])
        for mine, theirs in _expanded(rows[maybe], starts, stops):
            edits = _distances(words.texts, mine, others.texts, table.owners[theirs], distance)
            near[mine[edits <= distance]] = True


class _Table:
    """Sequences by hash: `owners` in the order of their hashes. A table of bits is asked first: most are not there."""

    def __init__(self, hashes: np.ndarray, owners: np.ndarray) -> None:
        order = np.argsort(hashes)
        self.hashes, self.owners = hashes[order], owners[order]
        bits = len(hashes).bit_length() + 3
        self._shift = np.uint64(64 - bits)
        self._bits = np.zeros(1 << bits, bool)
        self._bits[hashes >> self._shift] = True

    def may_have(self, hashes: np.ndarray) -> np.ndarray:
        """False [n] where there is no such hash."""
        return self._bits[hashes >> self._shift]

    def ranges(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(start, stop) [n] of those with each hash in `owners`."""
        return np.searchsorted(self.hashes, hashes), np.searchsorted(self.hashes, hashes, side="right")


def _gathered(words: Words, left: int, distance: int, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, sequences) of all ways to leave `left` residues, of those hashes that fall to this part."""
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for cut in range(distance + 1):
        rows = np.flatnonzero(words.lengths == left + cut)
        if not len(rows):
            continue
        for column in _shortened(words.letters[rows, : left + cut], cut):
            mine = slice(None) if parts == 1 else (column >> np.uint64(32)) % np.uint64(parts) == part
            hashes.append(column[mine])
            owners.append(rows[mine])
    return np.concatenate(hashes), np.concatenate(owners)


def _shortened(letters: np.ndarray, cut: int) -> Iterator[np.ndarray]:
    """Hashes [N] uint64 of sequences [N, n] without `cut` of their residues, for all choices of these: of the sum of
    residue i's number times BASE^i, in which what stands behind a deleted residue has one power less."""
    count, length = letters.shape
    with np.errstate(over="ignore"):
        powers = np.array([pow(_BASE, place, 1 << 64) for place in range(length)], np.uint64)
        sums = np.zeros((length + 1, count), np.uint64)
        np.cumsum(((letters.astype(np.uint64) + np.uint64(1)) * powers).T, axis=0, out=sums[1:])
        once, twice = np.uint64(_INVERSE), np.uint64(pow(_INVERSE, 2, 1 << 64))
        if cut == 0:
            yield sums[length]
        for i in range(length if cut else 0):
            if cut == 1:
                yield sums[i] + (sums[length] - sums[i + 1]) * once
                continue
            for j in range(i + 1, length):
                middle = (sums[j] - sums[i + 1]) * once
                yield sums[i] + middle + (sums[length] - sums[j + 1]) * twice


def _meeting(hashes: np.ndarray, owners: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i < j) of sequences with a hash in common, some at a time, each once at a time."""
    order = np.argsort(hashes)
    hashes, owners = hashes[order], owners[order]
    new = np.ones(len(hashes), bool)
    new[1:] = hashes[1:] != hashes[:-1]
    starts = np.flatnonzero(new)
    ends = np.repeat(np.append(starts[1:], len(hashes)), np.diff(np.append(starts, len(hashes))))
    later = np.arange(1, len(hashes) + 1)
    some = later < ends
    for first, second in _expanded(owners[some], later[some], ends[some]):
        second = owners[second]
        # One number a pair: numbers are sorted much faster than rows.
        keys = np.unique((np.minimum(first, second) << np.int64(32) | np.maximum(first, second))[first != second])
        if len(keys):
            yield keys >> np.int64(32), keys & np.int64((1 << 32) - 1)


def _expanded(rows: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows[k], p) for all k and all p in range(starts[k], stops[k]), some at a time."""
    counts = stops - starts
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(rows):
        done = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, done + _BLOCK, side="right")))
        number = counts[begin:end]
        shift = np.repeat(starts[begin:end] - (totals[begin:end] - number - done), number)
        yield np.repeat(rows[begin:end], number), shift + np.arange(int(number.sum()))
        begin = end


def _distances(
    texts: Sequence[str], first: np.ndarray, others: Sequence[str], second: np.ndarray, distance: int
) -> np.ndarray:
    """Edits between texts[first] and others[second] [n]; more than `distance` where there are more."""
    return _rapidfuzz().cpdist(
        [texts[place] for place in first.tolist()],
        [others[place] for place in second.tolist()],
        scorer=_levenshtein(),
        score_cutoff=distance,
        dtype=np.int64,
    )


def compared(words: Words, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(i, j, edits) of the pairs i < j that are at most `distance` edits apart, each compared with each, some rows at a
    time. Raises UserError without rapidfuzz."""
    cdist, levenshtein = _rapidfuzz().cdist, _levenshtein()
    step = max(1, _BLOCK // max(1, len(words.texts)))
    for start in range(0, len(words.texts), step):
        rows = words.texts[start : start + step]
        edits = cdist(rows, words.texts[start:], scorer=levenshtein, score_cutoff=distance, dtype=np.int32)
        first, second = np.nonzero(np.triu(edits <= distance, 1))
        yield start + first, start + second, edits[first, second]


def _ways(length: int, cut: int) -> int:
    return math.comb(length, cut)


def _rapidfuzz() -> ModuleType:
    try:
        from rapidfuzz import process
    except ModuleNotFoundError:
        raise UserError("splitting peptides by similarity needs rapidfuzz: pip install -e '.[mimir]'") from None
    return process


def _levenshtein() -> object:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance
