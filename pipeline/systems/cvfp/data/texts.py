"""Documents of a source, tokenised and cut to the length of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import numpy as np

from pipeline.data.packing import DocumentEncoder
from pipeline.data.records import RecordLog
from pipeline.data.sources.base import Document, Order, Source
from pipeline.errors import UserError

LEAST = 2
"""Tokens of a row: a context, and what it is to predict."""


@dataclass
class Cut:
    """Rows of tokens [each 2 to `length`] uint32, in the order of the documents, and the document that each is of."""

    rows: list[np.ndarray] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out or cut, for the log."""


def read_cut(
    source: Source, encode: DocumentEncoder, length: int, wanted: int | None, *, skip: bool, shuffle: bool = False
) -> Cut:
    """The first `wanted` documents of a source (None: all), each cut to its first `length` tokens.

    Where the source holds fewer, and where it holds a single one, the later tokens of long documents are rows too, as
    many as are wanted. `skip`: pass over records that cannot be read. `shuffle`: first in an order that is random and
    always the same, not in that of the source. Raises UserError.
    """
    notes = _Notes()
    documents = _encoded(source, encode, skip=skip, shuffle=shuffle, notes=notes)
    whole: list[np.ndarray] = []
    longer = 0
    for ids in islice(documents, wanted):
        longer += len(ids) > length
        # A second document says that the source is not a single one; then no later token is wanted but by a number.
        if wanted is None and whole:
            whole[0], ids = whole[0][:length], ids[:length]
        whole.append(ids)
    cut = Cut(notes=notes.lines())
    in_pieces = len(whole) == 1 or (wanted is not None and len(whole) < wanted)
    if not in_pieces:
        cut.rows, cut.owners = [ids[:length] for ids in whole], list(range(len(whole)))
        if longer:
            cut.notes.append(f"{longer:,} documents cut to their first {length} tokens")
        return cut
    places = islice(_places([len(ids) for ids in whole], length), wanted)
    # In the order of the documents: rows of one stand together.
    for owner, start in sorted(places):
        cut.rows.append(whole[owner][start : start + length])
        cut.owners.append(owner)
    asked = f", of {wanted:,} that were asked for" if wanted is not None else ""
    if len(cut.rows) > len(whole):
        cut.notes.append(f"{len(whole):,} documents{asked}, in {len(cut.rows):,} pieces of up to {length} tokens")
    if wanted is not None and len(cut.rows) < wanted:
        cut.notes.append(f"{len(cut.rows):,} rows of {wanted:,} that were asked for: the source holds no more")
    return cut


def _places(lengths: list[int], length: int) -> Iterator[tuple[int, int]]:
    """(document, first token) of rows: the beginnings of all documents, then their second rows, and so on. A rest of
    fewer than two tokens is no row."""
    for start in range(0, max(lengths, default=0), length):
        yield from ((owner, start) for owner, size in enumerate(lengths) if size - start >= LEAST)


@dataclass
class _Notes:
    empty: int = 0
    passed_over: int = 0

    def lines(self) -> list[str]:
        counted = ((self.empty, "empty or short documents left out"), (self.passed_over, "records passed over"))
        return [f"{number:,} {what}" for number, what in counted if number]


def _documents(source: Source, *, shuffle: bool) -> Iterator[Document]:
    # The seed is that of no run: all are of the same documents.
    order = Order(streams=1, local_streams=range(1), held_out=False, holdout=0.0, shuffle=shuffle, seed=0)
    documents = source.open(order)
    if not shuffle:
        yield from documents.scan()
        return
    for position in count():
        document = documents.read(0, position)
        if document is None:
            return
        yield document


def _encoded(
    source: Source, encode: DocumentEncoder, *, skip: bool, shuffle: bool, notes: _Notes
) -> Iterator[np.ndarray]:
    """Tokens of the documents that have some, without an end-of-document token."""
    log = RecordLog(skip=skip, remedy=source.remedy)
    for document in _documents(source, shuffle=shuffle):
        if document.problem is not None:
            log.refuse_or_skip(document)
            notes.passed_over += 1
            continue
        log.note(document)
        found = encode(document)
        if found is None or not document.text.strip():
            notes.empty += 1
            continue
        ids = found[:-1].astype(np.uint32)
        if len(ids) < LEAST:
            raise _too_short(document, len(ids))
        yield ids


def _too_short(document: Document, tokens: int) -> UserError:
    return UserError(
        f"{document.name} has {tokens} token, and a row needs {LEAST}, one of them to be predicted: take it out, or"
        f" leave such documents out with --data.min-tokens {LEAST}"
    )
