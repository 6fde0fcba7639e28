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
from pipeline.ops.rope import Rotation, rotate

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
        [..., kv_heads, dim]: [..., kv_heads], float64 for float64 keys, else float32. Has no gradient."""
        with torch.no_grad():
            key, value = _scaled(k, v)
            by_key, by_value = (
                torch.einsum("...hd,hd->...h", x, weight.to(x.dtype))
                for x, weight in ((key, self.key), (value, self.value))
            )
            return by_key + by_value

    def weights(self, k: Tensor, v: Tensor) -> Tensor:
        """Of tokens where slots merge, like `logits`, without a gradient."""
        return (self.logits(k, v).clamp(-MOST, MOST) / 2).exp()


def _scaled(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the map is linear in, scaled so that a rate that suits square maps suits vectors. Of a value its direction
    alone, since how large values are differs much between layers."""
    wide, dim = sum_dtype(k), k.shape[-1]
    k, v = k.to(wide), v.to(wide)
    return math.sqrt(dim) * k, dim * v / v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)


class ImportanceLoss(NamedTuple):
    """Of a step's queries and this rank's key-value heads."""

    gradient: Tensor
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
    tokens = k.shape[1]
    logits = importance.logits(k, v)
    every = max(1, tokens // QUERIES)
    places = torch.arange(every - 1, tokens, every, device=k.device)
    with torch.no_grad():
        back = places[:, None] - torch.arange(tokens, device=k.device)
        seen = (segment_ids[:, places, None] == segment_ids[:, None]) & (back >= 0)
        behind = (seen & (back > window) & (back <= window + reach) & kept[:, None])[:, None]
        given = _attention(q, k, rotation, places, seen, scale, logits.dtype).masked_fill_(~behind, 0)
        attention = given.sum(-1, keepdim=True)
        expected = logits.transpose(1, 2)[:, :, None].masked_fill(~behind, -math.inf)
        total = expected.logsumexp(-1, keepdim=True)
        # Of a query with nothing behind its window nothing is expected.
        expected = (expected - total.masked_fill(total == -math.inf, 0)).masked_fill_(~behind, -math.inf)
        # As the gradient is known, neither attention nor wide keys have to be kept for the backward pass.
        gradient = (attention * expected.exp() - given).sum(2).transpose(1, 2)
        nats = -(given * expected.masked_fill_(~behind, 0)).sum(dtype=torch.float64)
        slopes = [every * torch.einsum("bthd,bth->hd", x, gradient) for x in _scaled(k, v)]
    slope = torch.stack([(x * y).sum() for x, y in zip(slopes, importance, strict=True)]).sum()
    return ImportanceLoss(slope - slope.detach(), nats, attention.sum(dtype=torch.float64))


def _attention(
    q: Tensor, k: Tensor, rotation: Rotation, places: Tensor, seen: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """What the queries at `places` give to every token, summed over the heads of a group: [batch, kv_heads, queries,
    tokens]."""
    keys = rotate(k, rotation).transpose(1, 2).contiguous().transpose(2, 3)
    asked = rotate(q[:, places], Rotation(*(x[:, places] for x in rotation)))
    asked = scale * asked.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4).to(dtype)
    given = (asked.flatten(2, 3) @ keys.to(dtype)).unflatten(2, (-1, len(places)))
    return given.masked_fill_(~seen[:, None, None], -math.inf).softmax(-1).sum(2)
