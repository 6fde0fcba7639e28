"""A model on many peptides, divided over ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.parallel.collectives import all_gather_object
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.mimir.sampling.batch import Predicts


class Rows:
    """What is computed of rows, some at a time: rank r of R has every R-th batch. Results are those of one rank."""

    def __init__(self, system: Predicts, model: nn.Module, sync_point: SyncPoint, batch_size: int) -> None:
        self.system, self.model, self.sync_point, self.batch_size = system, model, sync_point, batch_size
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def __call__(
        self, what: str, count: int, compute: Callable[[np.ndarray], tuple[Tensor, ...]]
    ) -> tuple[np.ndarray, ...]:
        """compute(rows [n] of 0..count-1) gives tensors [n, ...]; returns them of all rows [count, ...], on every rank.
        Collective; raises UserError."""
        topology = self.sync_point.topology
        batches = np.split(np.arange(count), range(self.batch_size, count, self.batch_size)) if count else []
        rounds = -(-len(batches) // topology.world)
        mine = []
        for number in range(rounds):
            self.sync_point(f"{what}, {number + 1} of {rounds}")
            place = number * topology.world + topology.rank
            if place < len(batches):
                mine.append((place, tuple(part.cpu().numpy() for part in compute(batches[place]))))
        found = sorted(
            (pair for pairs in all_gather_object(topology, mine) for pair in pairs), key=lambda pair: pair[0]
        )
        return tuple(np.concatenate(parts) for parts in zip(*(parts for _, parts in found), strict=True))

    def tensor(self, values: np.ndarray) -> Tensor:
        """Whole numbers as int64, on the model's device."""
        return torch.from_numpy(values.astype(np.int64)).to(self.device)
