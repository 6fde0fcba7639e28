"""Windows of token files: where each is, which are held out, and in which order those of several sources come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from pipeline.data.sources.base import Permutation
from pipeline.data.tokens.files import TokenFile

Side = Literal["all", "training", "held_out"]
_SLOTS = 1 << 16
"""Windows of an interleaving that are looked at at once."""


class Windows:
    """The windows of some files: `length` ids each, one after the other from a file's start, its rest left out.

    Held out are the last windows of each file, `holdout` of all windows up to its end less those before: so the windows
    of a side are neighbours, and what is read of a document is on one side but for one per file.
    """

    def __init__(self, name: str, files: Sequence[TokenFile], length: int, side: Side, holdout: float) -> None:
        self.name, self.files, self.length = name, list(files), length
        self.too_short = [file for file in files if file.tokens < length]
        """Files that no window is in."""
        counts = [file.tokens // length for file in files]
        held = _held_out(counts, holdout) if side != "all" else [0] * len(counts)
        kept = [count - less for count, less in zip(counts, held, strict=True)]
        first, own = (kept, held) if side == "held_out" else ([0] * len(counts), kept)
        self._first, self._ends = np.array(first, np.int64), np.cumsum(own, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def place(self, window: int) -> tuple[TokenFile, int]:
        """The file of a window, and its first token there."""
        number = int(np.searchsorted(self._ends, window, side="right"))
        before = int(self._ends[number - 1]) if number else 0
        return self.files[number], (int(self._first[number]) + window - before) * self.length


def _held_out(counts: Sequence[int], holdout: float) -> list[int]:
    """Held-out windows per file: `holdout` of all, rounded as they add up, at least one where there are two."""
    share, total, taken, found = Fraction(repr(holdout)), sum(counts), 0, []
    whole = min(max(math.floor(share * total), 1), total - 1) if total > 1 else 0
    before = 0
    for count in counts:
        before += count
        # Of the rounded whole: the parts of all files are then as many.
        upto = whole * before // total if total else 0
        found.append(upto - taken)
        taken = upto
    return found


class Interleaving:
    """Which source each window of the run comes from: within one window of its ratio at any length.

    Of the sources that are not ahead of their ratio, the one whose next window is due first is next (earliest deadline
    first; Steiner and Yeomans, "Level schedules for mixed-model, just-in-time processes", Management Science 39, 1993).
    The state is how many windows each source has given.
    """

    def __init__(self, ratios: Sequence[Fraction]) -> None:
        """`ratios` sum to 1."""
        self._whole = math.lcm(*(ratio.denominator for ratio in ratios))
        self._weights = [int(ratio * self._whole) for ratio in ratios]
        assert sum(self._weights) == self._whole

    def next(self, taken: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """(source, number in the source) of the next `count` windows, [count] int64 each, and what is taken then."""
        if len(self._weights) == 1:
            numbers = np.arange(taken[0], taken[0] + count, dtype=np.int64)
            return np.zeros(count, np.int64), numbers, [taken[0] + count]
        taken, done, whole = list(taken), sum(taken), self._whole
        sources, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        for index in range(count):
            now = done + index + 1
            _, source = min(
                (-(-(given + 1) * whole // weight), source)
                for source, (weight, given) in enumerate(zip(self._weights, taken, strict=True))
                if given * whole < now * weight
            )
            sources[index], numbers[index] = source, taken[source]
            taken[source] += 1
        return sources, numbers, taken

    def taken_after(self, windows: int) -> list[int]:
        """Windows that each source has given of the first so many of a run."""
        # Where every source has given exactly its share, all begins anew.
        periods, rest = divmod(windows, self._whole)
        return [periods * weight + self._given(source, rest) for source, weight in enumerate(self._weights)]

    def _given(self, source: int, now: int) -> int:
        """Windows of a source among the first `now`: its share, rounded down or up.

        Up where the window in question is among them. Window j of source k may be given from the slot after
        j / ratio on. Of two that may, the one that is due first is given, whatever else waits; so what is given of all
        windows that are not due after this one is what a queue serves that gets one arrival after the other: with
        A(s) arrivals up to slot s, min over s <= now of A(s) + now - s. (Lindley, "The theory of queues with a single
        server", Mathematical Proceedings of the Cambridge Philosophical Society 48, 1952.)
        """
        weight, whole = self._weights[source], self._whole
        own, part = divmod(now * weight, whole)
        if not part:
            return own
        due = -(-(own + 1) * whole // weight)
        # Windows that are due before, or with it: of equals, the first source's is first.
        before = [
            own if other == source else (due - (other > source)) * share // whole
            for other, share in enumerate(self._weights)
        ]
        upto = [count + (other == source) for other, count in enumerate(before)]
        return own + self._served(upto, now) - self._served(before, now)

    def _served(self, most: Sequence[int], now: int) -> int:
        """What a queue has served after `now` slots of the first `most` windows of each source."""
        # Before a source has none left there are arrivals for every slot.
        first = min(count * self._whole // share + 1 for count, share in zip(most, self._weights, strict=True))
        least = 0
        # Ratios of many digits have products beyond 64 bits.
        kind = np.int64 if (now + 1) * self._whole < 1 << 62 else object
        for start in range(first, now + 1, _SLOTS):
            slots = np.arange(min(_SLOTS, now + 1 - start)).astype(kind) + start
            arrived = sum(
                np.minimum(-(-slots * share // self._whole), count)
                for count, share in zip(most, self._weights, strict=True)
            )
            least = min(least, int((arrived - slots).min()))
        return now + least


def shuffled(windows: Windows, source: int, numbers: np.ndarray, seed: int, shuffle: bool) -> np.ndarray:
    """The windows [n] that are the `numbers`-th [n] of a source: each once per epoch, in an order of the epoch."""
    count = len(windows)
    epochs, places = np.divmod(numbers, count)
    if not shuffle:
        return places
    found = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        found[here] = Permutation(count, "windows", seed, source, epoch).many(places[here].astype(np.uint64))
    return found
