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


@torch.no_grad()
def sequential_with_growth(
    transition: Transition, embedded: Tensor, start: Tensor, mask: Tensor, initial: Tensor | None = None
) -> Solved:
    """As `sequential`, and `Solved.growth`: a tangent vector that goes through the Jacobian of every token, scaled to
    length 1 after each (Benettin et al., "Lyapunov characteristic exponents", Meccanica 15, 1980)."""
    generator = torch.Generator().manual_seed(0)
    tangent = torch.randn(start.shape, generator=generator).to(start)
    tangent = tangent / tangent.norm(dim=-1, keepdim=True)
    context, found = start, torch.zeros_like(embedded)
    logs = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    for position in range(int(mask.sum(1).max())):
        token = embedded[:, position]
        pushed = torch.func.jvp(lambda entering, token=token: transition(entering, token), (context,), (tangent,))
        context, moved = pushed[0], pushed[1]
        factor = moved.norm(dim=-1, keepdim=True)
        there = mask[:, position]
        # A context that is forgotten at once leaves no direction to follow.
        least = torch.finfo(factor.dtype).tiny
        logs += torch.where(there, factor.squeeze(-1).double().clamp_min(least).log(), 0.0)
        tangent = torch.where(factor > least, moved / factor.clamp_min(least), tangent)
        found[:, position] = context
    return Solved(found, 1, 0.0, start, growth=logs / mask.sum(1).clamp_min(1))
