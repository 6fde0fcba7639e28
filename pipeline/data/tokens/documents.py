"""Documents inside a token file: where they begin and end, and what they were made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.tokens.files import TokenFile
from pipeline.data.tokens.sidecar import Sidecar
from pipeline.errors import UserError

BLOCK = 1 << 16
"""Ids that are looked through at a time."""


@dataclass(frozen=True)
class FoundDocument:
    """One document: tokens `start` to `stop` of a file, its end-of-document id included."""

    start: int
    stop: int
    source: str | None = None
    """The file that it was made from; None where no sidecar says."""
    number: int | None = None
    """Its number among the documents with text of that file, from 0."""

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def documents_from(file: TokenFile, sidecar: Sidecar | None, eos_id: int, position: int) -> Iterator[FoundDocument]:
    """The document that holds token `position`, and those after it. Raises UserError beyond the file's end."""
    if not 0 <= position < file.tokens:
        raise UserError(f"{file.name} has no token {position}: it has {file.tokens:,}, from 0 on")
    start = _start(file, eos_id, position)
    while start < file.tokens:
        stop = _stop(file, eos_id, start)
        source, number = _source(file, sidecar, eos_id, start)
        yield FoundDocument(start, stop, source, number)
        start = stop


def _start(file: TokenFile, eos_id: int, position: int) -> int:
    """The first token of the document that holds `position`."""
    upto = position
    while upto > 0:
        begin = max(0, upto - BLOCK)
        ends = np.flatnonzero(file.read(begin, upto - begin) == eos_id)
        if len(ends):
            return begin + int(ends[-1]) + 1
        upto = begin
    return 0


def _stop(file: TokenFile, eos_id: int, start: int) -> int:
    """After the end-of-document id of the document that begins at `start`; the file's end where there is none."""
    begin = start
    while begin < file.tokens:
        count = min(BLOCK, file.tokens - begin)
        ends = np.flatnonzero(file.read(begin, count) == eos_id)
        if len(ends):
            return begin + int(ends[0]) + 1
        begin += count
    return file.tokens


def _source(file: TokenFile, sidecar: Sidecar | None, eos_id: int, start: int) -> tuple[str | None, int | None]:
    begin = 0
    for span in sidecar.spans if sidecar is not None else ():
        if start < begin + span.tokens:
            return span.source, _count(file, eos_id, begin, start)
        begin += span.tokens
    return None, None


def _count(file: TokenFile, eos_id: int, begin: int, stop: int) -> int:
    """End-of-document ids in tokens `begin` to `stop`."""
    blocks = (file.read(at, min(BLOCK, stop - at)) for at in range(begin, stop, BLOCK))
    return sum(int((block == eos_id).sum()) for block in blocks)
