"""Small recurrences that stand for a model, and documents, for tests of the measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.parallel.topology import Topology
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.config import CvfpConfig, SolveConfig
from pipeline.systems.cvfp.documents import DocumentSet
from pipeline.systems.cvfp.evaluation.measures import ContextMeasures

ONE = SyncPoint(Topology())


class Recurrence:
    """c_t = tanh(a W c_{t-1} + V e_t) in float64: contracting for a < 1, where W is orthogonal."""

    def __init__(self, width: int = 8, vocab: int = 11, factor: float = 0.5, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.table = normal(vocab, width)
        self.recurrent = factor * torch.linalg.qr(normal(width, width)).Q
        self.width, self.device, self.calls = width, torch.device("cpu"), 0

    def embedded(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def applied(self, contexts: Tensor, ids: Tensor) -> Tensor:
        return torch.tanh(contexts.double() @ self.recurrent.T + self.embedded(ids))

    def contexts(self, ids: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
        self.calls += 1
        context = torch.zeros(len(ids), self.width, dtype=torch.float64) if start is None else start.double()
        found = []
        for place in range(ids.shape[1]):
            context = self.applied(context[:, None], ids[:, place : place + 1])[:, 0]
            found.append(context)
        # What stands beyond a row's end is not a context of anything.
        return torch.stack(found, 1).masked_fill(~mask[..., None], torch.nan)


def documents(lengths: Sequence[int], training: int, vocab: int = 11, seed: int = 0) -> DocumentSet:
    """Random tokens."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens = generator.integers(0, vocab, sum(lengths)).astype(np.uint32)
    return DocumentSet(tokens, np.cumsum(lengths), training, vocab, "random tokens", "none")


CARRIES = ("document", "stream", "circular")


def measures(carry: str = "document", factor: float = 0.3) -> tuple[ContextMeasures, Recurrence]:
    """Of 24 documents, 17 of them for training, whose tokens do not divide by any number of ranks; the published
    weights are a recurrence that forgets nothing."""
    data = documents([13, 5, 11, 7, 2, 13, 9, 12, 6, 10, 8, 13, 4, 3, 13, 12, 9, 13, 11, 12, 9, 13, 13, 10], 17)
    solve = SolveConfig("jacobi" if carry == "circular" else "sequential")
    sizes = CvfpConfig(width=8, vocab=11, carry=carry, solve=solve)  # type: ignore[arg-type]
    config = RunConfig("small", sizes, steps=1, batch_size=3, sequence_length=12, lr=0.1)
    untrained = {False: Recurrence(factor=0.5), True: Recurrence(factor=4.0)}
    return ContextMeasures(config, data, untrained.__getitem__), Recurrence(factor=factor)
