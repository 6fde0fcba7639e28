"""Where a row's recurrence begins: zero, or the context that something before it has left."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.system import Carry, CarryEntry
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.solve.border import from_the_left
from pipeline.systems.cvfp.solve.transition import ends_of

ENDS = "ends"
"""Of the carry: the context after the last token that each stream has read [rows, D] float32."""


def start_of(batch: DocumentBatch, carry: Carry, width: int, topology: Topology, *, way: str, other: bool) -> Tensor:
    """The context [rows, D] before each row's first token.

    Of documents (`way` document): zero, or with `other` the end of the document that the stream has read before. Of a
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


def with_ends(batch: DocumentBatch, contexts: Tensor, start: Tensor, carry: Carry) -> Carry:
    """The carry after contexts [rows, L, D] that began at `start` [rows, D]; a row without a token leaves its own."""
    before = carry[ENDS].tensor if ENDS in carry else start
    return {**carry, ENDS: CarryEntry(ends_of(contexts, batch.lengths, before))}
