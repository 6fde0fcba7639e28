"""How much attention a key will receive once it lies behind the window, predicted from the key and its value.

Slots merge the nearest keys (`pipeline.ops.store_slots`). What is merged loses most where later queries look, so tokens
have weights, in the criterion and in the means: the root of the attention that is predicted for them. Which keys of a
context will be attended to has been predicted for eviction before (Locret, arXiv 2410.01805), by a small network per
layer from queries, keys and values. Here it is linear in a key and the direction of its value, and needs nothing that
the window does not carry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.ops.checks import sum_dtype
from pipeline.ops.rope import Rotation, turn

QUERIES = 16
"""Of a step's tokens, as many or a few more ask in the loss, at equal distances: it costs little beside the step."""
MOST = 16.0
"""Bound of a predicted logarithm, either way: its exponential stays finite and above 0 in float32."""


class Importance(NamedTuple):
    """A linear map per key-value head; all zero, every token weighs the same."""

    key: Tensor
    """[kv_heads, dim]."""
    value: Tensor
    """Like key."""

    def logits(self, k: Tensor, v: Tensor) -> Tensor:
        """The logarithm of the attention that is expected, up to a constant of the head: of k (before RoPE) and v
        [..., kv_heads, tokens, dim]: [..., kv_heads, tokens], float64 for float64 keys, else float32. Has no gradient.
        Scaled so that a rate that suits square maps suits vectors."""
        wide, dim = sum_dtype(k), k.shape[-1]
        with torch.no_grad():
            by_key, by_value = (
                (x.to(wide) @ weight.to(wide)[..., None]).squeeze(-1) for x, weight in ((k, self.key), (v, self.value))
            )
            return math.sqrt(dim) * by_key + dim * by_value / _lengths(v, wide)

    def weights(self, k: Tensor, v: Tensor) -> Tensor:
        """What tokens weigh where slots merge: of k and v [..., tokens, kv_heads, dim], [..., tokens, kv_heads], like
        `logits`."""
        logits = self.logits(k.transpose(-3, -2), v.transpose(-3, -2)).transpose(-2, -1)
        return (logits.clamp(-MOST, MOST) / 2).exp()


def _lengths(v: Tensor, wide: torch.dtype) -> Tensor:
    """Of values [..., dim]: by their direction alone, since how large they are differs much between layers."""
    return torch.linalg.vector_norm(v, dim=-1, dtype=wide).clamp_min(torch.finfo(wide).tiny)


class ImportanceLoss(NamedTuple):
    """Of a step's queries and this rank's key-value heads."""

    surrogate: Tensor
    """0, and differentiable: its gradient in the importance is that of `nats`, times tokens per query."""
    nats: Tensor
    """Sum of the cross-entropies, each times the attention that the query's head group gives behind the window."""
    attention: Tensor
    """Sum of that attention."""


def importance_loss(
    importance: Importance,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation,
    segment_ids: Tensor,
    kept: Tensor,
    *,
    window: int,
    reach: int,
    scale: float,
) -> ImportanceLoss:
    """The cross-entropy of the attention that queries give to what lies behind their window, if they had every key,
    under the softmax of the importance, which knows nothing of the query. Its optimum is the mean attention. Where a
    document goes on from the step before, tokens of that step are in none of it, its sinks neither.

    Args:
        q: [batch, tokens, heads, dim], before RoPE; k, v likewise with kv_heads.
        rotation: of the tokens, [batch, tokens, 1, dim / 2].
        segment_ids: [batch, tokens] int64, equal for tokens of one document.
        kept: [batch, tokens] bool: tokens that slots may take, which all are but the attention sinks. Those draw most
            of the attention: they count in its sum, and are no target.
        window, reach: a query asks for keys further than `window` and no further than `window + reach` positions.
        scale: of the logits.
    """
    tokens, dim, wide = k.shape[1], k.shape[-1], sum_dtype(k)
    turns = Rotation(*(x.transpose(1, 2) for x in rotation))
    wide_k, wide_v = (x.detach().transpose(1, 2).to(wide, memory_format=torch.contiguous_format) for x in (k, v))
    every = max(1, tokens // QUERIES)
    places = torch.arange(every - 1, tokens, every, device=k.device)
    with torch.no_grad():
        logits = importance.logits(wide_k, wide_v)
        back = places[:, None] - torch.arange(tokens, device=k.device)
        seen = (segment_ids[:, places, None] == segment_ids[:, None]) & (back >= 0)
        behind = (seen & (back > window) & (back <= window + reach) & kept[:, None])[:, None]
        asked = q.transpose(1, 2)[:, :, places].to(wide)
        given = _attention(scale * asked, wide_k, turns, places, seen).masked_fill_(~behind, 0)
        attention = given.sum(-1, keepdim=True)
        expected = logits[:, :, None].masked_fill(~behind, -math.inf)
        total = expected.logsumexp(-1, keepdim=True)
        # Of a query with nothing behind its window nothing is expected.
        expected = (expected - total.masked_fill(total == -math.inf, 0)).masked_fill_(~behind, -math.inf)
        # As the gradient is known, neither attention nor wide keys have to be kept for the backward pass.
        gradient = (attention * expected.exp() - given).sum(2)
        nats = -(given * expected.masked_fill_(~behind, 0)).sum(dtype=torch.float64)
        scaled = ((math.sqrt(dim) * gradient, wide_k), (dim * gradient / _lengths(wide_v, wide), wide_v))
        slopes = [every * (x[:, :, None] @ y).squeeze(2).sum(0) for x, y in scaled]
    slope = torch.stack([(x * y).sum() for x, y in zip(slopes, importance, strict=True)]).sum()
    return ImportanceLoss(slope - slope.detach(), nats, attention.sum(dtype=torch.float64))


def _attention(q: Tensor, k: Tensor, rotation: Rotation, places: Tensor, seen: Tensor) -> Tensor:
    """What queries [batch, heads, queries, dim] of the tokens at `places` give to every token of k [batch, kv_heads,
    tokens, dim], both before RoPE, summed over the heads of a group: [batch, kv_heads, queries, tokens]."""
    cos, sin = (x.to(k.dtype) for x in rotation)
    keys, asked = turn(k, cos, sin), turn(q, cos[:, :, places], sin[:, :, places])
    given = asked.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ keys.transpose(2, 3)
    given = given.unflatten(2, (-1, len(places))).masked_fill_(~seen[:, None, None], -math.inf)
    return given.softmax(-1).sum(2)
