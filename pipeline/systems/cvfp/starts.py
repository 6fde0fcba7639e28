"""Where a row's recurrence begins: zero, or the context that something before it has left."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.system import Carry, CarryEntry
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet, rows_of
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.solve.border import from_the_left
from pipeline.systems.cvfp.solve.transition import ends_of

ENDS = "ends"
"""Of the carry: the context after the last token that each stream has read [rows, D] float32."""


def start_of(batch: DocumentBatch, carry: Carry, width: int, topology: Topology, *, way: str, other: bool) -> Tensor:
    """The context [rows, D] before each row's first token.

    Of documents (`way` document): zero, or with `other` the end of the document that the stream has read before, which
    is another one where a stream has three or more (see `ends_of_others` for the rest). Of a
    stream: where the row left off; in a pass's first slot the end of the part before it, of the pass before, and before
    the first part zero, or in a circle the end of the last part. Collective there.
    """
    zero = torch.zeros(batch.rows, width, device=batch.ids.device)
    if ENDS not in carry:
        return zero
    ends = carry[ENDS].tensor
    if way == "document":
        return ends if other else zero
    return ends if batch.slot else from_the_left(ends, topology, circular=way == "circular")


def needs_others(batch: DocumentBatch) -> bool:
    """Whether what a stream has read before may be the very document that it begins with again: of one or two."""
    return batch.slot == 0 and batch.slots <= 2


def ends_of_others(reader: Reader, documents: DocumentSet, batch: DocumentBatch) -> Tensor:
    """The end [rows, D], from zero at the present weights, of the training document before each row's; before the first
    one stands the last. Zero where there is one document in all. The same of any ranks and micro-batches; the blocks
    are called as often on every rank."""
    if documents.training < 2:
        return torch.zeros(batch.rows, reader.width, device=batch.ids.device)
    own = np.searchsorted(documents.ends, batch.first.cpu().numpy(), side="right")
    ids, lengths = map(
        torch.from_numpy, rows_of(documents, ((own - 1) % documents.training).tolist(), batch.ids.shape[1])
    )
    ids, lengths = ids.to(batch.ids.device), lengths.to(batch.ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    contexts = reader.contexts(ids, mask)
    return ends_of(contexts, lengths, torch.zeros_like(contexts[:, 0]))


def with_ends(batch: DocumentBatch, contexts: Tensor, start: Tensor, carry: Carry) -> Carry:
    """The carry after contexts [rows, L, D] that began at `start` [rows, D]; a row without a token leaves its own."""
    before = carry[ENDS].tensor if ENDS in carry else start
    return {**carry, ENDS: CarryEntry(ends_of(contexts, batch.lengths, before))}
