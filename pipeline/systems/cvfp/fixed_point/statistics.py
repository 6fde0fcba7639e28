"""Sums of contexts, from which their mean and covariance follow, over micro-batches and ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology


class ContextSums:
    """Count, sum and second moments of contexts, float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._packed = torch.zeros(width * width + width + 1, dtype=torch.float64, device=device)
        self._width = width

    def add(self, contexts: Tensor) -> None:
        """Contexts [tokens, D]; products are made in their own precision."""
        width = self._width
        # From the first context, of which a few decimals may be all that differs.
        self._packed[: width * width] += (contexts.T @ contexts).flatten().double()
        self._packed[width * width : -1] += contexts.double().sum(0)
        self._packed[-1] += len(contexts)

    def reduced(self, topology: Topology) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] over all ranks, float64. Collective."""
        packed = self._packed.clone()
        if topology.world > 1:
            dist.all_reduce(packed)
        count = packed[-1].clamp_min(1)
        mean = packed[self._width**2 : -1] / count
        second = packed[: self._width**2].view(self._width, self._width) / count
        return mean, second - torch.outer(mean, mean)
