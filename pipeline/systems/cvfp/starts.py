"""Where a row's recurrence begins: zero, or the context that something before it has left."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.parallel.topology import Topology
from pipeline.runtime.exit import log_line
from pipeline.system import Carry, CarryEntry
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet, rows_of
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.solve.border import Border, from_the_left
from pipeline.systems.cvfp.solve.sweeps import solver
from pipeline.systems.cvfp.solve.transition import Solved, ends_of

ENDS = "ends"
"""Of the carry: the context after the last token that each stream has read [rows, D] float32."""


def start_of(
    batch: DocumentBatch, carry: Carry, sizes: CvfpConfig, topology: Topology, *, other: bool = False
) -> Tensor:
    """The context [rows, D] before each row's first token.

    Of documents: zero, or with `other` the end of the document that the stream has read before, which is another one
    where a stream has three or more (see `ends_of_others` for the rest).

    Of a stream in parts: where the row left off; in a pass's first slot the end of the part before it, of the pass
    before, and before the first part zero, or in a circle the end of the last part. Those ends are of the weights of a
    pass ago: as far as contexts forget, which is what the first phase is for, that does not matter. Collective.

    Of rows that follow each other (`CvfpConfig.adjacent`): before the first of all ranks the end of the last one of the
    slot before, of a pass's first slot as above. The other rows' is `solve_rows`' to find. Collective.
    """
    zero = torch.zeros(batch.rows, sizes.width, device=batch.ids.device)
    if ENDS not in carry:
        return zero
    ends, ring = carry[ENDS].tensor, sizes.carry == "circular"
    if sizes.carry == "document":
        return ends if other else zero
    if sizes.adjacent:
        return from_the_left(ends, topology, circular=ring or batch.slot > 0)
    return ends if batch.slot else from_the_left(ends, topology, circular=ring)


def solve_rows(
    reader: Reader,
    batch: DocumentBatch,
    start: Tensor,
    sizes: CvfpConfig,
    topology: Topology,
    initial: Tensor | None = None,
) -> Solved:
    """The contexts of a step's rows by the run's way of solving, and the contexts before them.

    Rows that follow each other are solved as one stream over all ranks, whose borders move with every sweep; where a
    pass is one step, a circle is closed in it, and its contexts are a periodic orbit at these weights. Collective.
    """
    if not sizes.adjacent:
        return reader.solved(batch.ids, batch.mask, start, initial=initial)
    # The stream's first row is the first data rank's, and no row is empty: others' `first` is not read.
    border = Border(topology, first=start[0], circular=sizes.carry == "circular" and batch.slots == 1)
    way = solver(sizes.solve, border)
    return reader.solved(batch.ids, batch.mask, start, initial=initial, solve=way)


def warn_unsettled(solved: Solved, sizes: CvfpConfig, topology: Topology) -> bool:
    """Whether the sweeps ran out before contexts came to rest, which the first rank says."""
    if not solved.settled and topology.rank == 0:
        log_line(
            f"warning: after {solved.sweeps} sweeps contexts still move by {solved.residual:.2g} of their norm, which"
            f" is above --model.solve.tolerance {sizes.solve.tolerance:g}: give more --model.solve.most, or"
            " --model.solve.way sequential; said once, see the metric residual"
        )
    return not solved.settled


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
