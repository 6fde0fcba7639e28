"""All tokens at once, from the contexts of the sweep before, as often as needed.

The fixed point of C = F(shift(C), E) is the recurrence itself: after k sweeps from any contexts the first k tokens of
a row are exact, whatever is added to a token for the change of the one before it. A Jacobi sweep adds nothing, so an
error goes on by one token a sweep and is multiplied there by the Jacobian of F. A Newton sweep would add that
Jacobian times the change, for all tokens at once; as D x D numbers a token are too many, its diagonal stands for it,
and a scan solves the recurrence that is left (quasi-DEER: Gonzalez et al., arXiv 2407.19115; DEER: Lim et al., arXiv
2309.12252).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pipeline.ops.affine_scan import affine_scan
from pipeline.systems.cvfp.config import SolveConfig
from pipeline.systems.cvfp.solve.border import Border, change
from pipeline.systems.cvfp.solve.sequential import sequential
from pipeline.systems.cvfp.solve.transition import Solved, Solver, Transition, ends_of, shifted


def solver(config: SolveConfig, border: Border | None = None) -> Solver:
    """The way that a run has chosen (--model.solve). border: of sweeps, see `jacobi`."""
    if config.way == "sequential":
        assert border is None
        return sequential
    way = jacobi if config.way == "jacobi" else newton
    return partial(way, tolerance=config.tolerance, most=config.most, border=border)


def jacobi(
    transition: Transition,
    embedded: Tensor,
    start: Tensor,
    mask: Tensor,
    initial: Tensor | None = None,
    *,
    tolerance: float,
    most: int,
    border: Border | None = None,
) -> Solved:
    """See `Solver`. Ends when no context moved by more than `tolerance` of its norm (or the rounding of the dtype, if
    that is more), when every token is exact, or after `most` sweeps.

    border: the rows are one stream, over all ranks; `start` is then that of the first sweep alone, and of none where
    there is `initial`, whose rows' ends are nearer. Collective.
    """
    return _sweeps(transition, embedded, start, mask, initial, tolerance, most, border, diagonal=False)


def newton(
    transition: Transition,
    embedded: Tensor,
    start: Tensor,
    mask: Tensor,
    initial: Tensor | None = None,
    *,
    tolerance: float,
    most: int,
    border: Border | None = None,
) -> Solved:
    """As `jacobi`, with the diagonal of the Jacobian; within a row, so a border is one sweep behind."""
    return _sweeps(transition, embedded, start, mask, initial, tolerance, most, border, diagonal=True)


@torch.no_grad()
def _sweeps(
    transition: Transition,
    embedded: Tensor,
    start: Tensor,
    mask: Tensor,
    initial: Tensor | None,
    tolerance: float,
    most: int,
    border: Border | None,
    *,
    diagonal: bool,
) -> Solved:
    contexts = torch.zeros_like(embedded) if initial is None else initial.to(embedded.dtype, copy=True)
    start = start.to(embedded.dtype)
    lengths = mask.sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    least = max(tolerance, 4 * torch.finfo(embedded.dtype).eps)
    if border is not None and initial is not None:
        start = border.starts(ends_of(contexts, lengths, start), lengths)
    sweeps, residual, settled = 0, torch.zeros(()), False
    while sweeps < most:
        # Without a border the tokens before this one are exact: they would not move.
        exact = 0 if border is not None else min(sweeps, longest)
        if border is None and exact == longest:
            settled = True
            break
        part = slice(exact, longest)
        before = contexts[:, exact - 1] if exact else start
        old, there = contexts[:, part], mask[:, part]
        residual = torch.zeros((), device=embedded.device)
        if longest:
            new = _sweep(transition, embedded[:, part], before, old, diagonal=diagonal)
            moved = (new - old).norm(dim=-1).float() / new.norm(dim=-1).float().clamp_min(1e-30)
            # A context that is not a number has not come to rest.
            residual = moved.nan_to_num(nan=torch.inf).masked_fill(~there, 0).max()
            contexts[:, part] = new
        sweeps += 1
        if border is not None:
            starts = border.starts(ends_of(contexts, lengths, start), lengths)
            residual, start = border.largest(torch.maximum(residual, change(starts, start, lengths))), starts
        if float(residual) <= least:
            settled = True
            break
    settled = settled or (border is None and sweeps >= longest)
    return Solved(contexts, sweeps, float(residual), start, settled)


def _sweep(transition: Transition, embedded: Tensor, before: Tensor, contexts: Tensor, *, diagonal: bool) -> Tensor:
    """Contexts [rows, L, D] after a sweep; `before` [rows, D] enters the first token."""
    inputs = shifted(contexts, before)
    if not diagonal:
        return transition(inputs, embedded)
    wide = torch.float64 if embedded.dtype == torch.float64 else torch.float32
    new, factor = (found.to(wide) for found in transition.with_diagonal(inputs, embedded))
    # An estimate beyond 1 would let a change grow without bound along the row, where F itself is bounded.
    factor = factor.clamp(-1, 1)
    found, _ = affine_scan(factor, new - factor * inputs.to(wide), state=before.to(wide))
    return found.to(embedded.dtype)
