"""`store_slots` in PyTorch: any device, any dtype."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.slots import Slots, SlotsByChunk


def store_slots_torch(
    slots: Slots, k: Tensor, v: Tensor, weights: Tensor, taken: Tensor, goes_on: Tensor, order: Tensor
) -> SlotsByChunk:
    """`store_slots` for arguments that it has checked."""
    found = []
    for index in range(k.shape[1]):
        found.append(slots)
        known = slots.where(goes_on[:, index])
        slots = store_chunk(known, k[:, index], v[:, index], weights[:, index], taken[:, index], order)
    keys, values = (
        torch.stack([x.to(k.dtype) for x in parts], dim=1)
        for parts in ([one.keys for one in found], [one.values for one in found])
    )
    counts, ages = (torch.stack(x, dim=1) for x in zip(*((one.counts, one.ages) for one in found), strict=True))
    return SlotsByChunk(keys, values, counts, ages, slots)


def store_chunk(slots: Slots, k: Tensor, v: Tensor, weights: Tensor, taken: Tensor, order: Tensor) -> Slots:
    """The slots after one chunk: k and v [batch, tokens, heads, dim], weights [batch, tokens, heads], taken [batch,
    tokens]."""
    count, tokens = slots.keys.shape[2], k.shape[1]
    present = taken[:, None].to(slots.counts.dtype).expand(-1, k.shape[2], -1)
    counts = torch.cat([slots.counts, present], dim=2)
    # A shuffle decides which half a candidate is in: of a text that repeats itself every two tokens, neighbours that
    # alternate between the halves would put all equal keys into one.
    halved = _present_first(counts, order)
    new_ages = torch.arange(tokens, 0, -1, device=k.device).to(counts.dtype).expand_as(present)
    keys, values, counts, ages, weight = (
        _taken(x, halved)
        for x in (
            torch.cat([slots.keys, k.transpose(1, 2).to(slots.keys.dtype)], dim=2),
            torch.cat([slots.values, v.transpose(1, 2).to(slots.values.dtype)], dim=2),
            counts,
            torch.cat([slots.ages + tokens, new_ages], dim=2),
            torch.cat([slots.weights, weights.transpose(1, 2).to(counts.dtype)], dim=2),
        )
    )
    over = ((counts > 0).sum(2) - count).clamp_min(0)
    first, second = slice(0, None, 2), slice(1, None, 2)
    halves = (tuple(x[:, :, half] for x in (keys, counts, ages, weight)) for half in (first, second))
    cost, partner = _merge_costs(*halves)
    rank = cost.argsort(dim=2, stable=True).argsort(dim=2, stable=True)
    goes = rank < over[..., None]
    gone, lost = (torch.where(goes, x[:, :, first], 0) for x in (counts, weight))
    total, heavier = (x[:, :, second].scatter_add(2, partner, given) for x, given in ((counts, gone), (weight, lost)))
    # What stays as it is does not make its partner younger.
    given = ages[:, :, first].masked_fill(gone == 0, math.inf)
    youngest = ages[:, :, second].scatter_reduce(2, partner, given, "amin")

    def mean(x: Tensor) -> Tensor:
        wide = partner[..., None].expand(*partner.shape, x.shape[-1])
        summed = x[:, :, second] * weight[:, :, second, None]
        summed = summed.scatter_add(2, wide, x[:, :, first] * lost[..., None])
        return summed / heavier.where(heavier > 0, 1)[..., None]

    merged = [_woven(x[:, :, first], mean(x)) for x in (keys, values)]
    merged += [
        _woven(x[..., None], y[..., None])
        for x, y in ((counts[:, :, first] - gone, total), (ages[:, :, first], youngest), (weight[:, :, first], heavier))
    ]
    kept = _present_first(merged[2].squeeze(-1))[..., :count]
    found = [_taken(x, kept) for x in merged]
    keys, values, *sums = (x.where(found[2] > 0, 0) for x in found)
    return Slots(keys, values, *(x.squeeze(-1) for x in sums))


_Half = tuple[Tensor, ...]
"""Keys [batch, heads, n, dim], counts, ages and weights [batch, heads, n]."""


def _merge_costs(half: _Half, other: _Half) -> tuple[Tensor, Tensor]:
    """The cost of merging each key of a half with the cheapest of the other, inf where either is empty, and which that
    is: [batch, heads, n] each."""
    (keys, counts, ages, weights), (others, other_counts, other_ages, other_weights) = half, other
    squares = keys.square().sum(-1)[..., None] + others.square().sum(-1)[..., None, :]
    distance = (squares - 2 * keys @ others.transpose(-1, -2)).clamp_min(0)
    absent = (counts == 0)[..., None] | (other_counts == 0)[..., None, :]
    w, u = weights[..., None], other_weights[..., None, :]
    age = torch.minimum(ages[..., None], other_ages[..., None, :])
    cost = distance * (w * u / (w + u)) / (age + 1).sqrt()
    least, partner = cost.masked_fill(absent, math.inf).min(dim=-1)
    return least, partner


def _present_first(counts: Tensor, places: Tensor | None = None) -> Tensor:
    """Indices [batch, heads, n] that put what is there first, in its order or in that of `places` [n]."""
    absent = (counts == 0).long()
    if places is not None:
        absent = absent * len(places) + places
    return absent.argsort(dim=2, stable=True)


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """x [batch, heads, n, ...] at `order` [batch, heads, m]."""
    if x.dim() == 3:
        return x.gather(2, order)
    return x.gather(2, order[..., None].expand(*order.shape, x.shape[-1]))


def _woven(first: Tensor, second: Tensor) -> Tensor:
    """Two halves [batch, heads, n, dim], the second of n or n - 1, as they lay before: first, second, first, ..."""
    missing = first.shape[2] - second.shape[2]
    both = torch.stack([first, F.pad(second, (0, 0, 0, missing))], dim=3)
    return both.flatten(2, 3)[:, :, : first.shape[2] + second.shape[2]]
