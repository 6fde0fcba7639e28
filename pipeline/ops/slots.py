"""Slots: a bounded store of keys and values, as `pipeline.ops.store_slots` fills it."""

from __future__ import annotations

import functools
import random
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.ops.checks import sum_dtype


class Slots(NamedTuple):
    """The slots of `batch` streams; those in use come first, in no order."""

    keys: Tensor
    """[batch, heads, slots, dim] float32 (float64 for float64 keys): weighted means of keys before RoPE."""
    values: Tensor
    """[batch, heads, slots, dim], like keys: the same means of their values."""
    counts: Tensor
    """[batch, heads, slots], like keys: tokens in each; 0 where a slot is empty."""
    ages: Tensor
    """[batch, heads, slots], like keys: how many tokens have come since its newest one, that one included."""
    weights: Tensor
    """[batch, heads, slots], like keys: sum of its tokens' weights, in the criterion of merging and in means."""

    @classmethod
    def empty(cls, batch: int, heads: int, slots: int, dim: int, like: Tensor) -> Slots:
        """Of streams that have stored nothing; `heads` are key-value heads, `like` has the device and the dtype."""
        keys = like.new_zeros((batch, heads, slots, dim), dtype=sum_dtype(like))
        return cls(keys, torch.zeros_like(keys), *(torch.zeros_like(keys[..., 0]) for _ in range(3)))

    def where(self, rows: Tensor) -> Slots:
        """The same in rows [batch] bool, and empty ones in the others."""
        wide = rows[:, None, None]
        return Slots(*(x.where(wide[..., None] if x.dim() == 4 else wide, 0) for x in self))


class SlotsByChunk(NamedTuple):
    """The slots as every chunk of a step finds them, and those after the step."""

    keys: Tensor
    """[batch, chunks, heads, slots, dim], in the dtype of the step's keys."""
    values: Tensor
    """Like keys."""
    counts: Tensor
    """[batch, chunks, heads, slots], as in `Slots`."""
    ages: Tensor
    """Like counts."""
    after: Slots


class SlotKeys(NamedTuple):
    """What the queries of each chunk see besides the tokens near them."""

    keys: Tensor
    """[batch, chunks, kv_heads, slots, dim]; as they are read, after RoPE. The native kernel gets them as they are
    stored."""
    values: Tensor
    """Like keys."""
    counts: Tensor
    """[batch, chunks, kv_heads, slots]: tokens in each; 0 where a slot is empty."""
    shift: Tensor
    """[batch, tokens, heads]: added to a query's logits of all slots."""
    sink_k: Tensor
    """[batch, chunks, sinks, kv_heads, dim], after RoPE."""
    sink_v: Tensor
    """Like sink_k."""


class SlotMaps(NamedTuple):
    """How slots are read: k as k + k `keys`, v as v + v `values`; their logits with `q . query` added."""

    keys: Tensor
    """[kv_heads, dim, dim]."""
    values: Tensor
    """Like keys."""
    query: Tensor
    """[heads, dim]."""

    def shifted(self, shift: Tensor, q: Tensor) -> Tensor:
        """What is added to the logits of all slots, with `shift` [batch, tokens, heads] of q [batch, tokens, heads,
        dim], before RoPE."""
        return shift + torch.einsum("bthd,hd->bth", q, self.query.to(q.dtype))

    def read(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of keys and values [..., kv_heads, slots, dim]."""
        return mapped(keys, self.keys), mapped(values, self.values)


def mapped(x: Tensor, change: Tensor) -> Tensor:
    """x [..., kv_heads, slots, dim] as it is read, with change [kv_heads, dim, dim]."""
    return x + torch.matmul(x, change.to(x.dtype))


@functools.cache
def shuffle(count: int) -> tuple[int, ...]:
    """Where each of `count` candidates goes before they are halved, always the same."""
    return tuple(random.Random(0).sample(range(count), count))
