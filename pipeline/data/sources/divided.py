"""A corpus of one document: its end is held out, and each stream reads a part of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from pipeline.data.sources.base import Document, Order, Permutation, Place
from pipeline.errors import UserError


@dataclass(frozen=True)
class WholeText:
    """The document, in UTF-8."""

    name: str
    data: bytes
    undecodable: bool


class DividedText:
    """One side of the hold-out of a single document.

    The held-out side is its end: the last `holdout` of its bytes, from the first line that begins there on (the first
    character where none does). Each side is divided in the same way into as many parts as there are streams, of equal
    size but for the rest of a line, and a part is a document: streams that all read the whole would read the same.
    """

    def __init__(self, whole: WholeText, order: Order) -> None:
        self._whole, self._order = whole, order
        size = len(whole.data)
        cut = _boundary(whole.data, max(int(size * (1 - order.holdout)), 1), size)
        if order.holdout and not 0 < cut < size:
            raise UserError(
                f"{whole.name} is the only document, and its {size} bytes cannot be divided by --data.holdout: give"
                " more text"
            )
        first, last = (cut, size) if order.held_out else (0, cut)
        even = [first + (last - first) * part // order.streams for part in range(order.streams + 1)]
        inner = [_boundary(whole.data, start, stop) for start, stop in pairwise(even[1:])]
        # The rest of a character may reach beyond the next cut where parts are a few bytes.
        self._cuts = [first, *accumulate(inner, max), last]

    def count(self) -> int:
        return self._order.streams

    def read(self, epoch: int, position: int) -> Document | None:
        if position >= self._order.streams:
            return None
        return self._part(
            Permutation(self._order.streams, "parts", self._order.seed, epoch)(position)
            if self._order.shuffle
            else position
        )

    def scan(self) -> Iterator[Document]:
        return map(self._part, range(self._order.streams))

    def hint(self, epoch: int, position: int) -> dict[str, Any] | None:
        return None

    def seek(self, places: dict[int, Place]) -> None:
        pass

    def _part(self, index: int) -> Document:
        start, stop = self._cuts[index], self._cuts[index + 1]
        text = self._whole.data[start:stop].decode()
        return Document(f"{self._whole.name} (bytes {start} to {stop})", text, undecodable=self._whole.undecodable)


def _boundary(data: bytes, start: int, stop: int) -> int:
    """The first place from `start` on where a line begins, before `stop`; where none does, where a character does."""
    newline = data.find(b"\n", max(start - 1, 0), max(stop - 1, 0))
    if newline >= 0:
        return newline + 1
    while start < len(data) and data[start] & 0xC0 == 0x80:
        start += 1
    return start
