"""Passes over documents, or over parts of the stream that they make: the same rows in the same slot of every pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pipeline.data.loader import stream_layout
from pipeline.data.resume import check_fingerprint
from pipeline.errors import UserError
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet, rows_of


class PassLoader:
    """With the contract of `StatefulLoader`: a position of two integers, and global batches that no layout changes.

    Of documents, stream i has the documents i, i + R, i + 2R ..., one a slot, of R streams. Of the stream of all
    documents' tokens, it has the i-th of R contiguous parts, cut into slots of `length` tokens; parts differ by a token
    at most. A stream whose last slot is missing has a row of length 0 there.
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
        stream: bool = False,
    ) -> None:
        """Raises UserError where there is no document."""
        self.documents, self.length, self.stream = documents, length, stream
        self.batch_size, self.held_out = batch_size, held_out
        self.rows, self._local = stream_layout(batch_size, grad_accum, data_rank, data_degree)
        count = len(documents.ends)
        self._range = range(documents.training, count) if held_out else range(documents.training)
        if not self._range:
            raise UserError(f"{documents.name} has no document to {'hold out' if held_out else 'train on'}: give more")
        starts = np.concatenate([[0], documents.ends])
        self._first, self._last = int(starts[self._range.start]), int(documents.ends[self._range[-1]])
        self._starts = starts
        if stream:
            self._borders = np.linspace(self._first, self._last, self.rows + 1).astype(np.int64)
            self.slots = int(-(-np.diff(self._borders).max() // length))
        else:
            self.slots = -(-len(self._range) // self.rows)
        self.seed = seed
        self.iteration = self.slot = 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        return {
            "documents": self.documents.fingerprint, "streams": self.rows, "length": self.length, "stream": self.stream,
        }  # fmt: skip

    def next_step(self) -> list[DocumentBatch]:
        """The micro-batches of one step, on the CPU."""
        parts = range(self._local.start, self._local.stop, self.batch_size)
        batches = [self._batch(range(start, start + self.batch_size)) for start in parts]
        self.slot += 1
        if self.slot == self.slots:
            self.iteration, self.slot = self.iteration + 1, 0
        return batches

    def _batch(self, streams: range) -> DocumentBatch:
        if self.stream:
            ids, lengths, first = self._parts(streams)
        else:
            chosen = [self._range.start + stream + self.slot * self.rows for stream in streams]
            there = [index if index < self._range.stop else -1 for index in chosen]
            ids, lengths = rows_of(self.documents, there, self.length)
            first = np.array([self._starts[index] if index >= 0 else 0 for index in there], np.int64)
        return DocumentBatch(
            torch.from_numpy(ids),
            torch.from_numpy(lengths),
            torch.tensor(list(streams)),
            torch.from_numpy(first),
            self.slot,
            self.slots,
            self.iteration,
        )

    def _parts(self, streams: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.zeros((len(streams), self.length), np.int64)
        lengths, firsts = np.zeros(len(streams), np.int64), np.zeros(len(streams), np.int64)
        for row, stream in enumerate(streams):
            first = min(int(self._borders[stream]) + self.slot * self.length, int(self._borders[stream + 1]))
            tokens = self.documents.tokens[first : min(first + self.length, int(self._borders[stream + 1]))]
            ids[row, : len(tokens)], lengths[row], firsts[row] = tokens, len(tokens), first
        return ids, lengths, firsts

    def reset(self) -> None:
        """Back to the first step of the first pass."""
        self.iteration = self.slot = 0

    def state_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "slot": self.slot, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at the step after the last one that was read."""
        check_fingerprint(state["fingerprint"], self.fingerprint)
        self.iteration, self.slot = int(state["iteration"]), int(state["slot"])

    def describe(self) -> str:
        """One line for logs."""
        what = "held out" if self.held_out else "to train on"
        cut = ", as one stream" if self.stream else ""
        return (
            f"{self.documents.name}: {len(self._range):,} documents {what}, {self._last - self._first:,} tokens{cut},"
            f" a pass in {self.slots:,} steps"
        )
