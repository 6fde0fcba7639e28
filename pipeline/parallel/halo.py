"""The tokens before a rank's part of the sequence: what a short causal convolution needs of the rank before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.parallel.scan import Place, all_gather
from pipeline.parallel.topology import Topology


def tokens_before(x: Tensor, first: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """The n tokens before this rank's part, differentiably, and the last n of the whole sequence, without gradient.

    x [batch, part, ...] is this rank's part, first [batch, n, ...] what comes before the whole sequence, the same on
    every rank and like x in the rest. Both results are [batch, n, ...], the second the same on every rank. Every part
    has n tokens or more, else ValueError. Collective where there are several sequence ranks, forward and backward.
    """
    count = first.shape[1]
    if x.shape[1] < count and topology.sequence > 1:
        raise ValueError(f"x has shape {list(x.shape)}: a part of the sequence needs {count} tokens at least")
    if topology.sequence == 1:
        return first, torch.cat([first, x], dim=1)[:, x.shape[1] :].detach()
    assert topology.sequence_group is not None
    place = Place(topology.sequence_group, topology.sequence_rank, topology.sequence)
    before, last = _TokensBefore.apply(place, x, first)
    return before, last


class _TokensBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, place: Place, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        ctx.place, ctx.shape = place, x.shape
        count = first.shape[1]
        (everyone,) = all_gather([x[:, x.shape[1] - count :]], place)
        before = everyone[place.rank - 1] if place.rank else first
        last = everyone[-1].clone()
        ctx.mark_non_differentiable(last)
        return before.clone(), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_before: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor]:
        place, count = ctx.place, grad_before.shape[1]
        (everyone,) = all_gather([grad_before], place)
        grad_x = grad_before.new_zeros(ctx.shape)
        if place.rank + 1 < place.ranks:
            grad_x[:, ctx.shape[1] - count :] = everyone[place.rank + 1]
        return None, grad_x, torch.zeros_like(grad_before) if place.rank else grad_before
