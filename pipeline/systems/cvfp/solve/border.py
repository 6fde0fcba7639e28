"""What crosses the borders of a stream that is cut into rows, over data ranks: one context a border and sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.parallel.topology import Topology


def from_the_left(
    ends: Tensor,
    topology: Topology,
    *,
    first: Tensor | None = None,
    circular: bool = False,
    empty: Tensor | None = None,
) -> Tensor:
    """The context before each row [rows, D], of rows that follow each other, rank after rank: its left neighbour's.

    ends [rows, D]: the context after each row's last token; ranks may have different numbers of rows, or none. Before
    the first row of all stands `first` [D], which every rank gives alike (zeros when None), or in a circle the last
    row's. empty [rows] bool: rows without a token, whose right neighbour gets what comes from further left. In a
    circle, a row with nothing to its left but empty ones gets `first`. Collective over all ranks: of each, one vector
    of D numbers and a flag are sent.
    """
    rows, width = ends.shape
    here = torch.ones(rows, dtype=torch.bool, device=ends.device) if empty is None else ~empty
    # The row before each row that has a token, by its number on this rank; -1: it is on a rank before.
    numbers = torch.where(here, torch.arange(rows, device=ends.device), -1)
    upto = torch.cat([numbers.new_full((1,), -1), numbers]).cummax(0).values
    last = upto[-1]
    message = torch.cat([ends[last.clamp_min(0)] if rows else ends.new_zeros(width), (last >= 0).to(ends.dtype)[None]])
    everyone = [message]
    if topology.world > 1:
        everyone = [torch.empty_like(message) for _ in range(topology.world)]
        dist.all_gather(everyone, message)
    # Ranks of one sequence group hold the same rows, so the first of each stands for it.
    heads, place = everyone[:: topology.sequence], topology.data_rank
    before = [*reversed(heads[:place]), *(reversed(heads[place:]) if circular else ())]
    entering = torch.zeros_like(message[:-1]) if first is None else first.to(message.dtype)
    for candidate in reversed(before):
        entering = torch.where(candidate[-1] > 0, candidate[:-1], entering)
    return torch.where(upto[:-1, None] >= 0, ends[upto[:-1].clamp_min(0)], entering)


def change(new: Tensor, old: Tensor, lengths: Tensor) -> Tensor:
    """How far a context before rows [rows, D] has moved at most, as a share of its norm; of empty rows 0."""
    moved = (new - old).norm(dim=-1).float() / new.norm(dim=-1).float().clamp_min(1e-30)
    # A context that is not a number has not come to rest.
    moved = moved.nan_to_num(nan=torch.inf).masked_fill(lengths == 0, 0)
    return moved.max() if len(moved) else torch.zeros((), device=new.device)


@dataclass(frozen=True)
class Border:
    """The borders of a whole stream whose rows are solved together: they move with every sweep, on all ranks alike."""

    topology: Topology
    first: Tensor | None = None
    """Before the stream's first token [D]; zeros when None."""
    circular: bool = False

    def starts(self, ends: Tensor, lengths: Tensor) -> Tensor:
        """The context before each row [rows, D]. Collective."""
        empty = lengths == 0
        return from_the_left(ends, self.topology, first=self.first, circular=self.circular, empty=empty)

    def largest(self, value: Tensor) -> Tensor:
        """The largest of all ranks' scalars, so that they end together. Collective."""
        if self.topology.world > 1:
            value = value.clone()
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value
