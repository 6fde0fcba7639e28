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


def global_counts(counts: Iterable[Counts], topology: Topology, device: torch.device) -> dict[str, Tensor]:
    """Counts of one optimizer step, per loss term, over micro-batches and data ranks; float64 scalars on `device`.

    Every sequence rank counts the whole rows of its group, so the sum over ranks holds each row `sequence` times.
    """
    totals: dict[str, int] = {}
    for micro in counts:
        for term, count in micro.items():
            totals[term] = totals.get(term, 0) + int(count)
    names = sorted(totals)
    packed = torch.tensor([totals[name] for name in names], dtype=torch.float64, device=device)
    if topology.world > 1:
        dist.all_reduce(packed)
    return {name: packed[index] / topology.sequence for index, name in enumerate(names)}


def scaled_loss(sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], topology: Topology) -> Tensor:
    """The scalar to call backward on: this rank's sums, each over its global count, times the ranks that are averaged.

    A non-finite loss is turned into NaN, so that its gradients are NaN and the update is skipped without a host
    synchronisation (an infinite loss alone can have finite gradients).
    """
    total: Tensor | None = None
    for term, value in sums.items():
        part = value * (topology.world / counts[term].clamp_min(1)).to(value.dtype)
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
