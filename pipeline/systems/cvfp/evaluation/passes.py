"""Whether contexts forget where they began: the guide's `final_diff`, and the difference by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.evaluation.reader import Reads

TOKENS, PASSES = 100, 5
"""Of the guide's check."""


@dataclass(frozen=True)
class PassDifferences:
    """Mean distance of a token's contexts in one pass and the next."""

    differences: tuple[float, ...]
    norm: float
    """Mean norm of the contexts of the last pass."""

    @property
    def final(self) -> float:
        """The guide's `final_diff`: below 1e-4 it calls it excellent, 1e-3 good, 1e-2 moderate."""
        return self.differences[-1]

    @property
    def relative(self) -> float:
        """The last difference as a share of the norm."""
        return self.final / self.norm if self.norm else self.final


def pass_differences(reader: Reads, tokens: np.ndarray, sync_point: SyncPoint) -> PassDifferences:
    """Five passes over the first 100 training tokens, without noise, each from the last context of the pass before and
    the first from zero. `tokens` [T]: the training tokens, of whatever documents. Collective: all ranks compute it.

    The weights do not change, so passes differ by where they start alone: this says how fast a start is forgotten.
    """
    ids = torch.from_numpy(tokens[:TOKENS].astype(np.int64))[None].to(reader.device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    start, before, differences = None, None, []
    for _ in range(PASSES):
        sync_point("evaluation")
        contexts = reader.contexts(ids, mask, start)
        if before is not None:
            differences.append(float((contexts - before).norm(dim=-1).mean()))
        before, start = contexts, contexts[:, -1]
    assert before is not None
    return PassDifferences(tuple(differences), float(before.norm(dim=-1).mean()))


@dataclass(frozen=True)
class Positions:
    """By position in a row [L], float64: what the contexts of held-out tokens are there."""

    squares: Tensor
    """Mean squared difference, over dimensions, of contexts that began at zero and at another row's end."""
    norms: Tensor
    """Mean norm of those that began at zero."""


def by_position(reader: Reads, ids: Tensor, mask: Tensor, sync_point: SyncPoint) -> Positions:
    """Of tokens ids [rows, L] in mask [rows, L], two rows or more, none of them empty: one row alone has no other's
    end. Collective: all ranks compute it."""
    assert len(ids) > 1 and mask.any(1).all()
    sync_point("evaluation")
    one = reader.contexts(ids, mask)
    rows = torch.arange(len(ids), device=ids.device)
    ends = one[rows, (mask.sum(1) - 1).clamp_min(0)].roll(1, 0)
    sync_point("evaluation")
    other = reader.contexts(ids, mask, ends)
    count = mask.sum(0).double()
    squares = (one.double() - other.double()).square().mean(-1)
    norms = one.double().norm(dim=-1)
    squares, norms = (values.masked_fill(~mask, 0).sum(0) / count for values in (squares, norms))
    return Positions(squares.cpu(), norms.cpu())
