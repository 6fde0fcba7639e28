"""The global-token loss: gradients of one device that saw the whole batch, whatever the layout of ranks.

DeepSpeed is told nothing of the sequence degree: it sees `world` data-parallel ranks and averages their gradients, for
every ZeRO stage alike (told of it, stages 0 to 2 divide by world / degree and stage 3 by world). So a rank's loss is
its sum times `world` over the count of all ranks, and the average of the gradients is the gradient of sum / count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.data.batch import Counts
from pipeline.parallel.topology import Topology


def add_counts(counts: Iterable[Counts]) -> dict[str, int]:
    """What each loss term averages over, added up over micro-batches."""
    totals: dict[str, int] = {}
    for micro in counts:
        for term, count in micro.items():
            totals[term] = totals.get(term, 0) + int(count)
    return totals


def scaled_loss(sums: Mapping[str, Tensor], counts: Mapping[str, float], topology: Topology) -> Tensor:
    """The scalar to call backward on: this rank's sums, each over its global count, times the ranks that are averaged.

    A non-finite loss is turned into NaN, so that its gradients are NaN, whatever they are scaled by, and the update is
    skipped without a host synchronisation (an infinite loss alone can have finite gradients).
    """
    total: Tensor | None = None
    for term, value in sums.items():
        # A loss scale would be lost in float16, whose largest number is 65,504.
        wide = value.float() if value.dtype == torch.float16 else value
        part = wide * (topology.world / max(1, counts[term]))
        total = part if total is None else total + part
    if total is None:
        raise ValueError("the system returned no loss term")
    return total * torch.where(torch.isfinite(total.detach()), 1.0, torch.nan).to(total.dtype)


def reduce_sums(values: Mapping[str, Tensor], topology: Topology, device: torch.device) -> dict[str, Tensor]:
    """Sums scalars over all ranks in one collective; float64 scalars."""
    names = sorted(values)
    packed = torch.stack([values[name].detach().double().to(device) for name in names])
    if topology.world > 1:
        dist.all_reduce(packed)
    return {name: packed[index] for index, name in enumerate(names)}
