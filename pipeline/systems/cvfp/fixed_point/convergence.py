"""Whether contexts have forgotten where they began, at fixed weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.parallel.loss import reduce_sums
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.model.reader import Reader, ends_of
from pipeline.systems.cvfp.phase import DocumentLoader
from pipeline.systems.cvfp.solve.border import from_the_left

Before = Callable[[DocumentBatch], Tensor | None]
"""The contexts [rows, L, D] of a batch's tokens in the pass before; None where there was none."""


@torch.no_grad()
def convergence(
    reader: Reader,
    loader: DocumentLoader,
    threshold: float,
    sync_point: SyncPoint,
    *,
    before: Before | None = None,
    goes_on: bool = False,
) -> dict[str, float]:
    """`converged`: the share of tokens whose contexts from the zero start and from the end of another document (another
    row's piece, of a stream) differ by a mean square below the threshold; `start_distance`: the mean square itself.

    With the documents of each stream after those of the stream before it, in a circle, the other document is the one
    before: the same one whatever the ranks and micro-batches are. Of one document in all there is no other, and both
    are NaN. Any weights will do, such as those of `untrained_reader`. Over all ranks. Collective.

    With `before`, where it has any contexts, also `converged_pass_to_pass`, the guide's rule: the share of their tokens
    whose contexts here differ from them by a mean square below the threshold. Here rows begin at zero, or where a
    context `goes_on` from row to row at another one's end.
    """
    names = ("met", "square", "tokens", "documents", "unmoved", "compared")
    sums = {name: torch.zeros((), dtype=torch.float64, device=reader.device) for name in names}
    first: list[DocumentBatch] = []
    ends: list[Tensor] = []

    def from_both(batch: DocumentBatch, start: Tensor) -> Tensor:
        # Both at a time: a product of more rows reads the weights once.
        both = torch.cat([torch.zeros_like(start), start])
        one, other = reader.contexts(batch.ids.repeat(2, 1), batch.mask.repeat(2, 1), both).chunk(2)
        squares = (one - other).square().mean(-1)[batch.mask]
        sums["met"] += (squares < threshold).sum()
        sums["square"] += squares.sum(dtype=torch.float64)
        sums["tokens"] += len(squares)
        previous = None if before is None else before(batch)
        if previous is not None:
            moved = ((other if goes_on else one) - previous).square().mean(-1)[batch.mask]
            sums["unmoved"] += (moved < threshold).sum()
            sums["compared"] += len(moved)
        return one

    for slot in range(loader.slots):
        for micro, unmoved in enumerate(next_step(loader, sync_point, "evaluation")):
            batch = unmoved.to(reader.device)
            sums["documents"] += (batch.lengths > 0).sum()
            if slot:
                ends[micro] = ends_of(from_both(batch, ends[micro]), batch.lengths, ends[micro])
            else:
                zero = torch.zeros(batch.rows, reader.width, device=reader.device)
                first.append(batch)
                ends.append(ends_of(reader.contexts(batch.ids, batch.mask, zero), batch.lengths, zero))
    # A stream without a first document has none.
    empty = torch.cat([batch.lengths == 0 for batch in first])
    others = from_the_left(torch.cat(ends), sync_point.topology, circular=True, empty=empty)
    for batch, start in zip(first, others.split([batch.rows for batch in first]), strict=True):
        from_both(batch, start)
    totals = {name: float(value) for name, value in reduce_sums(sums, sync_point.topology, reader.device).items()}
    passes = {"converged_pass_to_pass": totals["unmoved"] / totals["compared"]} if totals["compared"] else {}
    if totals["documents"] < 2:
        return {"converged": math.nan, "start_distance": math.nan, **passes}
    tokens = totals["tokens"]
    return {"converged": totals["met"] / tokens, "start_distance": totals["square"] / tokens, **passes}
