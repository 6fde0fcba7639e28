"""Sums of contexts, from which their second moments follow, over micro-batches and ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology


class ContextSums:
    """Count and sum of c c^T of contexts, float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._packed = torch.zeros(width * width + 1, dtype=torch.float64, device=device)
        self._width = width

    def add(self, contexts: Tensor) -> None:
        """Contexts [tokens, D]; products are made in their own precision."""
        self._packed[:-1] += (contexts.T @ contexts).flatten().double()
        self._packed[-1] += len(contexts)

    def moments(self, topology: Topology) -> tuple[Tensor, float]:
        """E[c c^T] [D, D] over all ranks, float64, and of how many contexts; zeros where there is none. Collective."""
        packed = self._packed.clone()
        if topology.world > 1:
            dist.all_reduce(packed)
        mean = (packed[:-1] / packed[-1].clamp_min(1)).view(self._width, self._width)
        return mean, float(packed[-1])
