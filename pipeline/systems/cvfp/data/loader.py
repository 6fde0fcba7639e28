"""Passes over documents, or over parts of the stream that they make: the same rows in the same slot of every pass."""

from __future__ import annotations

import math

import numpy as np
import torch

from pipeline.data.epochs import EpochPosition
from pipeline.data.sources.base import Permutation
from pipeline.errors import UserError
from pipeline.systems.cvfp.data.texts import LEAST
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet, rows_of


class PassLoader(EpochPosition):
    """With the contract of `StatefulLoader`: an epoch is a pass, the offset its step, and no layout changes a global
    batch.

    Of R streams, the global batch, stream i has the documents i, i + R, i + 2R ..., one a slot; with `shuffle` in an
    order that `seed` decides, the same in every pass, so that the rows of a step are of anywhere in the data. A stream
    whose last slot is missing has a row of length 0 there.

    With `stream` it has the i-th of R contiguous parts of all documents' tokens, cut into as many pieces as there are
    slots, of `length` tokens at most. Parts differ by a token at most, and so do the pieces of one. With `adjacent`
    the pieces of a step follow each other: it has the tokens between those of the step before and of the step after.
    """

    def __init__(
        self,
        documents: DocumentSet,
        *,
        held_out: bool,
        length: int,
        batch_size: int,
        grad_accum: int = 1,
        data_rank: int = 0,
        data_degree: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        stream: bool = False,
        adjacent: bool = False,
    ) -> None:
        """Raises UserError where there is no document, or fewer than two tokens for a part of the stream."""
        self.documents, self.length, self.held_out = documents, length, held_out
        self.stream, self.adjacent = stream, adjacent and stream
        self._chosen = range(documents.training, len(documents.ends)) if held_out else range(documents.training)
        if not self._chosen:
            raise UserError(f"{documents.name} has no document to {'hold out' if held_out else 'train on'}: give more")
        self._starts = np.concatenate([[0], documents.ends])
        first, last = int(self._starts[self._chosen.start]), int(self._starts[self._chosen.stop])
        self.tokens = last - first
        """Of one pass."""
        source = {
            "documents": documents.name,
            "rows": len(self._chosen),
            "tokens": self.tokens,
            "digest": documents.fingerprint,
        }
        super().__init__(
            len(self._chosen),
            name=documents.name,
            fingerprint={"source": source, "tokenizer": documents.tokenizer, "sequence_length": length},
            batch_size=batch_size,
            grad_accum=grad_accum,
            data_rank=data_rank,
            data_degree=data_degree,
            # A stream's order is that of its tokens, whatever the seed.
            seed=0 if stream else seed,
            shuffle=shuffle and not stream,
        )
        # Which documents share a slot is decided by the global batch.
        self.fingerprint["streams"] = self.rows
        if stream:
            self.fingerprint["adjacent"] = self.adjacent
        self._permutation = None
        if stream:
            if self.tokens < LEAST * self.rows:
                raise UserError(
                    f"{documents.name}: {self.tokens:,} tokens {'held out' if held_out else 'of training'} are fewer"
                    f" than {LEAST} for each of {self.rows:,} parts of the stream: give more, or a smaller --batch-size"
                )
            self.slots = math.ceil(math.ceil(self.tokens / self.rows) / length)
            # No piece is empty: a part has LEAST tokens, and fewer slots than tokens.
            parts = self.rows * self.slots if self.adjacent else self.rows
            self._borders = [first + self.tokens * part // parts for part in range(parts + 1)]
        else:
            self.slots = math.ceil(len(self._chosen) / self.rows)
            if shuffle:
                self._permutation = Permutation(len(self._chosen), "documents", seed)

    def next_step(self) -> list[DocumentBatch]:
        """The micro-batches of one step, on the CPU."""
        parts = range(self._local_rows.start, self._local_rows.stop, self.batch_size)
        batches = [self._batch(range(start, start + self.batch_size)) for start in parts]
        # Not before: a step that cannot be read leaves the position where it was.
        passes, self._offset = divmod(self._offset + 1, self.slots)
        self._epoch += passes
        return batches

    def _batch(self, streams: range) -> DocumentBatch:
        if self.stream:
            ids, lengths, first = self._pieces(streams)
        else:
            there = [self._document(stream + self._offset * self.rows) for stream in streams]
            ids, lengths = rows_of(self.documents, there, self.length)
            first = np.array([self._starts[index] if index >= 0 else 0 for index in there], np.int64)
        return DocumentBatch(
            torch.from_numpy(ids),
            torch.from_numpy(lengths),
            torch.tensor(list(streams)),
            torch.from_numpy(first),
            self._offset,
            self.slots,
            self._epoch,
        )

    def _document(self, place: int) -> int:
        """The document at a place of the order; -1 beyond its end."""
        if place >= len(self._chosen):
            return -1
        return self._chosen[place if self._permutation is None else self._permutation(place)]

    def _pieces(self, streams: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.zeros((len(streams), self.length), np.int64)
        lengths, firsts = np.zeros(len(streams), np.int64), np.zeros(len(streams), np.int64)
        for row, stream in enumerate(streams):
            if self.adjacent:
                piece = self._offset * self.rows + stream
                first, last = self._borders[piece], self._borders[piece + 1]
            else:
                start, size = self._borders[stream], self._borders[stream + 1] - self._borders[stream]
                first, last = (start + size * slot // self.slots for slot in (self._offset, self._offset + 1))
            ids[row, : last - first] = self.documents.tokens[first:last]
            lengths[row], firsts[row] = last - first, first
        return ids, lengths, firsts

    def describe(self) -> str:
        """One line for logs."""
        what = "held out" if self.held_out else "to train on"
        cut = ", as one stream" if self.stream else ""
        notes = "".join(f"; {note}" for note in self.documents.notes if not self.held_out)
        return (
            f"{self.documents.name}: {len(self._chosen):,} documents {what}, {self.tokens:,} tokens{cut}, a pass in"
            f" {self.slots:,} steps{notes}"
        )
