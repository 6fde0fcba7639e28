"""Whether contexts have forgotten where they began, at fixed weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.parallel.loss import reduce_sums
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.model.reader import Reader, ends_of
from pipeline.systems.cvfp.phase import DocumentLoader


@torch.no_grad()
def convergence(reader: Reader, loader: DocumentLoader, threshold: float, sync_point: SyncPoint) -> dict[str, float]:
    """`converged`: the share of tokens whose contexts from the zero start and from the end of another document (another
    row's piece, of a stream) differ by a mean square below the threshold; `start_distance`: the mean square itself.

    The other document is the one that the stream has read before; the first ones begin at the end of the last. Of one
    document a stream it is the same one. Over all ranks. Collective.
    """
    sums = {name: torch.zeros((), dtype=torch.float64, device=reader.device) for name in ("met", "square", "tokens")}
    first: list[DocumentBatch] = []
    ends: dict[int, Tensor] = {}

    def compare(batch: DocumentBatch, one: Tensor, other: Tensor) -> None:
        squares = (one - other).square().mean(-1)[batch.mask]
        sums["met"] += (squares < threshold).sum()
        sums["square"] += squares.sum(dtype=torch.float64)
        sums["tokens"] += len(squares)

    for slot in range(loader.slots):
        for micro, unmoved in enumerate(next_step(loader, sync_point, "evaluation")):
            batch = unmoved.to(reader.device)
            zero = torch.zeros(batch.rows, reader.width, device=reader.device)
            if slot == 0:
                first.append(batch)
                one = reader.contexts(batch.ids, batch.mask, zero)
            else:
                # Both at a time: a product of more rows reads the weights once.
                both = torch.cat([zero, ends[micro]])
                found = reader.contexts(batch.ids.repeat(2, 1), batch.mask.repeat(2, 1), both)
                one, other = found.chunk(2)
                compare(batch, one, other)
            ends[micro] = ends_of(one, batch.lengths, ends.get(micro, zero))
    for micro, batch in enumerate(first):
        zero = torch.zeros_like(ends[micro])
        found = reader.contexts(batch.ids.repeat(2, 1), batch.mask.repeat(2, 1), torch.cat([zero, ends[micro]]))
        compare(batch, *found.chunk(2))
    totals = reduce_sums(sums, sync_point.topology, reader.device)
    count = float(totals["tokens"].clamp_min(1))
    return {"converged": float(totals["met"]) / count, "start_distance": float(totals["square"]) / count}
