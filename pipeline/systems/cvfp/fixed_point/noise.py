"""Noise on the contexts that enter a training step."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.parallel.weights import generator_for
from pipeline.systems.cvfp.documents import DocumentBatch


def noise(batch: DocumentBatch, width: int, seed: int) -> Tensor:
    """Standard normal numbers [rows, L, width] on the device of `batch`.

    Those of a token are decided by seed, pass, the global position of the row's first token and the token's place in
    the row: not by the rows beside it, the ranks or the device. A row's are drawn one after the other on the CPU.
    """
    length = batch.ids.shape[1]
    drawn = [
        torch.randn(length, width, generator=generator_for(seed, f"context noise, pass {batch.iteration}, {first}"))
        for first in batch.first.tolist()
    ]
    return torch.stack(drawn).to(batch.ids.device)
