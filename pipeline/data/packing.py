"""Cuts the endless sequence of a stream's documents, each followed by EOS, into sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from xxhash import xxh3_128

from pipeline.data.batch import IGNORED
from pipeline.data.records import RecordLog
from pipeline.data.sources.base import Document, Documents, Order
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import UserError


@dataclass
class Cursor:
    """The position of a stream: `offset` tokens into the document at (epoch, position), its `segment`-th document."""

    epoch: int
    position: int
    offset: int = 0
    segment: int = 0
    skipped: int = 0
    """Records that had a problem and were passed over."""
    undecodable: int = 0
    """Documents that held what is no text."""
    read: str | None = ""
    """Digest of all documents before this one, in order; None: not known, in a run that began without."""
    document: str | None = None
    """Digest of this document, once part of it is read."""
    name: str | None = None
    """Name of this document, once part of it is read: for messages."""


def content_hash(document: Document) -> str:
    """Digest of what a document is for training; of one that has a problem, that it has one."""
    return xxh3_128(document.text.encode() if document.problem is None else b"\xff").hexdigest()


def chained(before: str, document: str) -> str:
    """Digest of a sequence of documents that is one longer."""
    return xxh3_128((before + document).encode()).hexdigest()


class DocumentEncoder:
    """A document to its ids with EOS, or None for one that is left out: an empty one, or one below `min_tokens`."""

    def __init__(self, tokenizer: Tokenizer, *, min_tokens: int, vocab_size: int) -> None:
        if tokenizer.eos_id >= vocab_size:
            raise UserError(
                f"--data.tokenizer {tokenizer.name} ends documents with id {tokenizer.eos_id}, beyond the model's"
                f" vocabulary of {vocab_size}: choose the tokenizer that the model was made for"
            )
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._least = max(min_tokens, 1)
        # An id that stands for text stands for a byte at least (one more id may be the space put before a document).
        self._least_bytes = self._least - 1 if tokenizer.byte_lengths() is not None else 0

    def __call__(self, document: Document) -> np.ndarray | None:
        """ids [tokens + 1] int32."""
        if not document.text or (self._least_bytes and len(document.text.encode()) < self._least_bytes):
            return None
        ids = self._tokenizer.encode(document.text)
        if len(ids) < self._least:
            return None
        if ids.max() >= self._vocab_size:
            outside = np.unique(ids[ids >= self._vocab_size])
            listed = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
            raise UserError(
                f"{document.name} has token ids {listed} beyond the model's vocabulary of {self._vocab_size}: choose"
                f" the tokenizer that the model was made for (--data.tokenizer is {self._tokenizer.name})"
            )
        return np.append(ids, self._tokenizer.eos_id).astype(np.int32)


class StreamPacker:
    """One stream. No document is cut short: one that does not fit goes on in the stream's next sequence."""

    def __init__(
        self,
        stream: int,
        documents: Documents,
        order: Order,
        encode: Callable[[Document], np.ndarray | None],
        nothing_found: Callable[[], None],
        log: RecordLog,
    ) -> None:
        self._stream, self._documents, self._order, self._encode = stream, documents, order, encode
        self._nothing_found, self._log = nothing_found, log
        self._cursor = Cursor(0, order.first(stream, 0))
        self._tokens: np.ndarray | None = None
        self._digest, self._name, self._undecodable = "", "", False

    def fill(self, input_ids: np.ndarray, labels: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray) -> None:
        """Writes the stream's next sequence into four arrays [T] int64."""
        done, length = 0, len(input_ids)
        while done < length:
            tokens = self._document()
            start = self._cursor.offset
            stop = min(start + length - done, len(tokens))
            here = slice(done, done + stop - start)
            input_ids[here] = tokens[start:stop]
            labels[here] = IGNORED
            # EOS is the document's last label; what follows EOS starts another document.
            following = tokens[start + 1 : stop + 1]
            labels[done : done + len(following)] = following
            segment_ids[here] = self._cursor.segment
            positions[here] = np.arange(start, stop)
            done += stop - start
            if stop == len(tokens):
                self._cursor = self._after_document(segment=self._cursor.segment + 1)
                self._tokens = None
            else:
                self._cursor = replace(self._cursor, offset=stop, document=self._digest, name=self._name)

    def _document(self) -> np.ndarray:
        """Tokens of the document at the cursor, which moves past documents that are left out."""
        fruitless = 0
        while self._tokens is None:
            cursor = self._cursor
            document = self._documents.read(cursor.epoch, cursor.position)
            if document is None:
                epoch = cursor.epoch + 1
                self._cursor = replace(cursor, epoch=epoch, position=self._order.first(self._stream, epoch))
                fruitless += 1
                if fruitless > 1:
                    self._nothing_found()
                continue
            self._digest, self._undecodable = content_hash(document), document.undecodable
            self._name = document.name
            if document.problem is not None:
                self._log.refuse_or_skip(document)
                self._cursor = replace(self._after_document(segment=cursor.segment), skipped=cursor.skipped + 1)
                continue
            self._log.note(document)
            self._tokens = self._encode(document)
            if self._tokens is None:
                self._cursor = self._after_document(segment=cursor.segment)
            elif cursor.offset >= len(self._tokens):
                raise UserError(
                    f"{document.name} is shorter than the position that the checkpoint holds: restore the document, or"
                    " start afresh with --resume never"
                )
        return self._tokens

    def _after_document(self, *, segment: int) -> Cursor:
        cursor = self._cursor
        return replace(
            cursor,
            position=cursor.position + self._order.streams,
            offset=0,
            segment=segment,
            undecodable=cursor.undecodable + self._undecodable,
            read=None if cursor.read is None else chained(cursor.read, self._digest),
            document=None,
            name=None,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        hint = self._documents.hint(self._cursor.epoch, self._cursor.position)
        return asdict(self._cursor) | ({"reader": hint} if hint is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a cursor of this version or of an earlier one, which has fewer fields."""
        self._cursor = Cursor(
            epoch=int(state["epoch"]),
            position=int(state["position"]),
            offset=int(state["offset"]),
            segment=int(state["segment"]),
            skipped=int(state.get("skipped", 0)),
            undecodable=int(state.get("undecodable", 0)),
            read=state.get("read"),
            document=state.get("document"),
            name=state.get("name"),
        )
        self._tokens = None
