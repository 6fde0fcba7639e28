"""Contexts of documents or of their stream, piece by piece, each token on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.documents import DocumentSet
from pipeline.systems.cvfp.evaluation.reader import Reads
from pipeline.systems.cvfp.model.reader import ends_of

TOLERANCE = 1e-4
"""A border of the stream has settled when its context moved by less than this share of its norm."""


@dataclass(frozen=True)
class Piece:
    """Rows of consecutive tokens."""

    ids: Tensor
    """[rows, L] int64."""
    mask: Tensor
    """[rows, L] bool: whether there is a token."""
    starts: Tensor
    """[rows, D]: the context before each row's first token."""
    contexts: Tensor
    """[rows, L, D]: the context after each token."""
    numbers: Tensor
    """[rows] int64, one for each row; documents are numbered in their order."""


@dataclass(frozen=True)
class Reading:
    """How tokens are read: in rows of at most `length` tokens, `rows` of them at a time on a rank."""

    documents: DocumentSet
    carry: str
    rows: int
    length: int

    def indices(self, *, training: bool) -> range:
        """Of the documents that are trained on, or held out."""
        count, first = len(self.documents.ends), self.documents.training
        return range(first) if training else range(first, count)

    def available(self, *, training: bool) -> int:
        """Tokens that are read of these documents: all of them, but no more than `length` of a document that begins
        with an empty context."""
        ends = self.documents.ends
        lengths = np.diff(ends, prepend=0)[list(self.indices(training=training))]
        return int((lengths if self.carry != "document" else np.minimum(lengths, self.length)).sum())

    def chosen(self, tokens: int, *, training: bool) -> list[np.ndarray]:
        """Documents whose lengths add up to `tokens`, from everywhere in the data: every k-th one, so that k times as
        many tokens are there, and then those in between. Of a stream its first part. The last one may be cut."""
        every = self.indices(training=training)
        step = max(1, self.available(training=training) // tokens) if self.carry == "document" else 1
        found: list[np.ndarray] = []
        for index in (index for first in range(step) for index in every[first::step]):
            document = self.documents.document(index)
            document = document[: self.length] if self.carry == "document" else document
            found.append(document[:tokens])
            tokens -= len(found[-1])
            if not tokens:
                break
        return found


def read(reader: Reads, reading: Reading, tokens: int, sync_point: SyncPoint, *, training: bool) -> Iterator[Piece]:
    """The contexts of the first `tokens` tokens of the documents that are trained on, or held out, at the reader's
    weights: this rank's part of them. Collective: every rank reads as many pieces, of which some may have no token.

    With --carry document every document begins at zero. Else the documents are one stream in parts, a row each, which
    are read again from the ends of their left neighbours until these no longer move: as the tokens one after the other,
    to 1e-4 of the contexts' norm. A piece is computed when it is asked for, and no other is held.
    """
    device = reader.device
    sequences = reading.chosen(tokens, training=training)
    if reading.carry == "document":
        yield from _documents(reader, reading, sequences, sync_point, device)
    else:
        yield from _stream(reader, reading, np.concatenate(sequences), sync_point, device)


def _documents(
    reader: Reads, reading: Reading, sequences: Sequence[np.ndarray], sync_point: SyncPoint, device: torch.device
) -> Iterator[Piece]:
    topology = sync_point.topology
    for first in range(0, len(sequences), reading.rows * topology.data):
        mine = sequences[first : first + reading.rows * topology.data][topology.data_rank :: topology.data]
        ids, mask = padded(mine, device)
        sync_point("evaluation")
        numbers = first + topology.data_rank + topology.data * torch.arange(len(ids), device=device)
        starts = torch.zeros(len(ids), reader.width, device=device)
        yield Piece(ids, mask, starts, reader.contexts(ids, mask, starts), numbers)


def padded(sequences: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [rows, L] int64 and mask [rows, L] of token sequences; of none, one row without a token."""
    lengths = torch.tensor([len(one) for one in sequences] or [0])
    ids = torch.zeros(len(lengths), max(1, int(lengths.max())), dtype=torch.int64)
    for row, one in zip(ids, sequences, strict=False):
        row[: len(one)] = torch.from_numpy(one.astype(np.int64))
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def _stream(
    reader: Reads, reading: Reading, tokens: np.ndarray, sync_point: SyncPoint, device: torch.device
) -> Iterator[Piece]:
    topology = sync_point.topology
    # No part is empty: every row but those at the end has at least one token of its own.
    parts = min(reading.rows * topology.data, len(tokens))
    rows = math.ceil(parts / topology.data)
    borders = [len(tokens) * part // parts for part in range(parts + 1)]
    bounds = list(pairwise(borders))[topology.data_rank * rows :][:rows]
    longest = max(end - begin for begin, end in pairwise(borders))
    own = [tokens[begin:end] for begin, end in bounds] + [tokens[:0]] * (rows - len(bounds))
    starts = torch.zeros(rows, reader.width, device=device)

    def once(context: Tensor) -> Iterator[Piece]:
        """The pieces of a pass from these starts."""
        for first in range(0, longest, reading.length):
            ids, mask = padded([one[first : first + reading.length] for one in own], device)
            sync_point("evaluation")
            contexts = reader.contexts(ids, mask, context)
            part = topology.data_rank * rows + torch.arange(rows, device=device)
            numbers = part + first // reading.length * rows * topology.data
            yield Piece(ids, mask, context, contexts, numbers)
            context = ends_of(contexts, mask.sum(1), context)

    for _ in range(parts + 1):
        for piece in once(starts):
            ends = ends_of(piece.contexts, piece.mask.sum(1), piece.starts)
        moved, starts = _borders(ends, starts, parts, sync_point, circular=reading.carry == "circular")
        if moved < TOLERANCE:
            break
    # Once more: to keep the pieces of every pass would take as much memory as there are tokens.
    yield from once(starts)


def _borders(
    ends: Tensor, starts: Tensor, parts: int, sync_point: SyncPoint, *, circular: bool
) -> tuple[float, Tensor]:
    """The starts [rows, D] that follow from all ranks' ends [rows, D], and by which share of the norm one moved."""
    topology = sync_point.topology
    rows = len(ends)
    every = [torch.empty_like(ends) for _ in range(topology.data)] if topology.world > 1 else [ends]
    if topology.world > 1:
        dist.all_gather(every, ends.contiguous())
    joined = torch.cat(every)[:parts]
    first = joined[-1:] if circular else torch.zeros_like(joined[:1])
    shifted = torch.cat([first, joined[:-1], joined.new_zeros(rows * topology.data - parts, joined.shape[1])])
    fresh = shifted[topology.data_rank * rows :][:rows]
    # All ranks have to go on together: each sees all borders.
    old = [torch.empty_like(starts) for _ in range(topology.data)] if topology.world > 1 else [starts]
    if topology.world > 1:
        dist.all_gather(old, starts.contiguous())
    norm = shifted.norm(dim=-1).clamp_min(1e-30)
    return float(((shifted - torch.cat(old)).norm(dim=-1) / norm).max()), fresh
