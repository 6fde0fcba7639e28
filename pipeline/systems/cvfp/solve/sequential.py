"""Token after token, all rows at once: exact, in as many steps as the longest row has tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.systems.cvfp.solve.transition import Solved, Transition


@torch.no_grad()
def sequential(
    transition: Transition, embedded: Tensor, start: Tensor, mask: Tensor, initial: Tensor | None = None
) -> Solved:
    """See `Solver`. Rows that have ended take no part in later steps; `initial` has no effect."""
    lengths = mask.sum(1)
    # Longest first: the rows that go on are the first ones, and no step copies them out.
    order = torch.argsort(lengths, descending=True, stable=True)
    ragged = not bool((lengths == embedded.shape[1]).all())
    going = (lengths[:, None] > torch.arange(embedded.shape[1], device=mask.device)).sum(0).tolist() if ragged else None
    tokens, context = (embedded[order], start[order]) if ragged else (embedded, start)
    found = torch.zeros_like(embedded)
    for position in range(embedded.shape[1]):
        if going is not None:
            if not going[position]:
                break
            context = context[: going[position]]
        context = transition(context, tokens[: len(context), position])
        found[: len(context), position] = context
    if ragged:
        found = torch.empty_like(found).index_copy_(0, order, found)
    return Solved(found, 1, 0.0, start)
