"""A bounded store of keys and values: what does not fit is merged, the nearest keys first.

A softmax over all keys that lie behind a window is approximated by one over `slots` means of keys, each with the
logarithm of the number of tokens that it stands for added to its logit: exact where the merged keys are equal
(Transformer-VQ, arXiv 2309.16354, does the same with a learned codebook). Which keys are merged is Ward's criterion (J.
Am. Stat. Assoc. 58, 1963): the pair that adds least to the sum of squared distances of keys from their slot's mean,
found among pairs of two halves of the candidates as token merging does (arXiv 2210.09461), so that a round of merges is
one matrix of distances. The criterion is divided by the root of the pair's age: without that new keys, each of one
token, are the cheapest to merge, and what lies right behind the window is blurred first. So resolution falls with
distance.

What is stored is a constant to the gradient, as the keys that a window carries between steps are.
"""

from __future__ import annotations

import functools
import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.checks import sum_dtype


class Slots(NamedTuple):
    """The slots of `batch` streams; those in use come first, in no order."""

    keys: Tensor
    """[batch, heads, slots, dim] float32 (float64 for float64 keys): means of keys before RoPE."""
    values: Tensor
    """[batch, heads, slots, dim], like keys: means of their values."""
    counts: Tensor
    """[batch, heads, slots], like keys: tokens in each; 0 where a slot is empty."""
    ages: Tensor
    """[batch, heads, slots], like keys: how many tokens have come since its newest one, that one included."""

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, dim: int, like: Tensor) -> Slots:
        """Of streams that have stored nothing; `heads` are key-value heads, `like` has the device and the dtype."""
        keys = like.new_zeros((batch, heads, slots, dim), dtype=sum_dtype(like))
        return cls(keys, torch.zeros_like(keys), torch.zeros_like(keys[..., 0]), torch.zeros_like(keys[..., 0]))

    def where(self, rows: Tensor) -> Slots:
        """The same in rows [batch] bool, and empty ones in the others."""
        wide = rows[:, None, None]
        return Slots(*(x.where(wide[..., None] if x.dim() == 4 else wide, 0) for x in self))


@torch.no_grad()
def store(slots: Slots, k: Tensor, v: Tensor, taken: Tensor, order: Tensor) -> Slots:
    """The slots after tokens with keys and values k, v [batch, tokens, heads, dim], where `taken` [batch, tokens] bool
    says so; `order` is `shuffle` of as many as slots and tokens, on their device.

    As many pairs are merged as there are tokens too many. Raises ValueError for more tokens than slots: every merge
    takes one of two halves away.
    """
    count, tokens = slots.keys.shape[2], k.shape[1]
    if tokens > count:
        raise ValueError(f"{tokens} tokens at once into {count} slots: give at most as many")
    present = taken[:, None].to(slots.counts.dtype).expand(-1, k.shape[2], -1)
    counts = torch.cat([slots.counts, present], dim=2)
    # A shuffle decides which half a candidate is in: of a text that repeats itself every two tokens, neighbours that
    # alternate between the halves would put all equal keys into one.
    halved = _present_first(counts, order)
    new_ages = torch.arange(tokens, 0, -1, device=k.device).to(counts.dtype).expand_as(present)
    keys, values, counts, ages = (
        _taken(x, halved)
        for x in (
            torch.cat([slots.keys, k.transpose(1, 2).to(slots.keys.dtype)], dim=2),
            torch.cat([slots.values, v.transpose(1, 2).to(slots.values.dtype)], dim=2),
            counts,
            torch.cat([slots.ages + tokens, new_ages], dim=2),
        )
    )
    over = ((counts > 0).sum(2) - count).clamp_min(0)
    first, second = slice(0, None, 2), slice(1, None, 2)
    halves = ((keys[:, :, half], counts[:, :, half], ages[:, :, half]) for half in (first, second))
    cost, partner = _merge_costs(*halves)
    rank = cost.argsort(dim=2, stable=True).argsort(dim=2, stable=True)
    gone = torch.where(rank < over[..., None], counts[:, :, first], 0)
    total = counts[:, :, second].scatter_add(2, partner, gone)
    # What stays as it is does not make its partner younger.
    given = ages[:, :, first].masked_fill(gone == 0, math.inf)
    youngest = ages[:, :, second].scatter_reduce(2, partner, given, "amin")

    def mean(x: Tensor) -> Tensor:
        wide = partner[..., None].expand(*partner.shape, x.shape[-1])
        summed = x[:, :, second] * counts[:, :, second, None]
        summed = summed.scatter_add(2, wide, x[:, :, first] * gone[..., None])
        return summed / total.clamp_min(1)[..., None]

    merged = [_woven(x[:, :, first], mean(x)) for x in (keys, values)]
    merged += [
        _woven(x[..., None], y[..., None])
        for x, y in ((counts[:, :, first] - gone, total), (ages[:, :, first], youngest))
    ]
    kept = _present_first(merged[2].squeeze(-1))[..., :count]
    found = [_taken(x, kept) for x in merged]
    keys, values, counts, ages = (x.where(found[2] > 0, 0) for x in found)
    return Slots(keys, values, counts.squeeze(-1), ages.squeeze(-1))


_Half = tuple[Tensor, Tensor, Tensor]
"""Keys [batch, heads, n, dim], counts and ages [batch, heads, n]."""


def _merge_costs(half: _Half, other: _Half) -> tuple[Tensor, Tensor]:
    """The cost of merging each key of a half with the cheapest of the other, inf where either is empty, and which that
    is: [batch, heads, n] each."""
    (keys, counts, ages), (others, other_counts, other_ages) = half, other
    squares = keys.square().sum(-1)[..., None] + others.square().sum(-1)[..., None, :]
    distance = (squares - 2 * keys @ others.transpose(-1, -2)).clamp_min(0)
    n, m = counts[..., None], other_counts[..., None, :]
    age = torch.minimum(ages[..., None], other_ages[..., None, :])
    cost = distance * (n * m / (n + m).clamp_min(1)) / (age + 1).sqrt()
    least, partner = cost.masked_fill((n == 0) | (m == 0), math.inf).min(dim=-1)
    return least, partner


@functools.cache
def shuffle(count: int) -> tuple[int, ...]:
    """Where each of `count` candidates goes before they are halved, always the same."""
    return tuple(random.Random(0).sample(range(count), count))


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
