"""Attention to a window and slots on a CPU: one call of SDPA over [band, sinks, slots] of every chunk.

What is added to logits stands in extra dimensions of queries and keys, so that fused kernels need no mask per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pipeline.ops.attention_sinks import blocks
from pipeline.ops.slots import SlotKeys

EXTRA = 8
"""Dimensions that are added to queries and keys: three are used, and kernels want multiples of eight."""
EMPTY = -3e4
"""What stands in the place of the logarithm of no tokens, in units of a key's extra dimension: finite in float16, and
exp() of it is 0 for every scale of logits in use."""


@dataclass(frozen=True, eq=False)
class DenseSlots:
    """A mask of every chunk."""

    window: int
    chunk: int
    mask: Tensor
    """[batch * chunks, 1, chunk, window + chunk + sinks + slots] additive: 0 where a query sees a key, else -inf."""
    masks: dict[int, Tensor] = field(default_factory=dict)
    """What `grouped` has made."""

    @classmethod
    def build(
        cls, ids: Tensor, all_ids: Tensor, own: Tensor, visible: Tensor, *, slots: int, dtype: torch.dtype
    ) -> DenseSlots:
        """Of documents by chunk `ids` [batch, chunks, chunk] and with the window before them `all_ids` [batch, window +
        chunks * chunk]; which queries are in the document of their chunk's first `own` [batch, chunks, chunk], and
        which sinks they see `visible` [batch, chunks, chunk, sinks]."""
        count, chunk = ids.shape[1:]
        window = all_ids.shape[1] - count * chunk
        offsets = torch.arange(window + chunk, device=ids.device)
        distance = offsets[window:, None] - offsets
        band = (ids[..., None] == all_ids.unfold(1, window + chunk, chunk)[:, :, None]) & (distance >= 0)
        parts = [band, visible, own[..., None].expand(-1, -1, -1, slots)]
        seen = torch.cat(parts, dim=-1).flatten(0, 1)[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill_(~seen, -math.inf)
        return cls(window, chunk, mask)

    def grouped(self, group: int) -> Tensor:
        """The mask of `group` heads that follow each other as queries of one."""
        if group not in self.masks:
            self.masks[group] = self.mask.repeat(1, 1, group, 1)
        return self.masks[group]


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DenseSlots,
    earlier: tuple[Tensor, Tensor] | None,
    seen: SlotKeys,
    scale: float,
) -> Tensor:
    """Shapes as in `attention_slots.slot_attention`; q and k after RoPE, like `earlier`, the keys and values of the
    window before the step."""
    batch, tokens, heads, dim = q.shape
    # In a key's extra dimensions, over the scale: the logarithm of its tokens in two parts, for bfloat16; and what
    # takes the query's shift.
    marked = torch.cat([q, q.new_ones(*q.shape[:3], 2), seen.shift[..., None].to(q.dtype)], dim=-1)
    by_chunk = "batch chunks keys heads dim -> (batch chunks) heads keys dim"
    queries = rearrange(blocks(F.pad(marked, (0, EXTRA - 3)), layout.chunk, 0), by_chunk)
    band_k, band_v = (
        _bands(F.pad(x, (0, EXTRA)), None if before is None else F.pad(before, (0, EXTRA)), layout)
        for x, before in zip((k, v), earlier or (None, None), strict=True)
    )
    sink_k, sink_v = (F.pad(rearrange(x, by_chunk), (0, EXTRA)) for x in (seen.sink_k, seen.sink_v))
    bias = torch.where(seen.counts > 0, seen.counts.clamp_min(1).log() / scale, EMPTY)
    coarse = bias.to(k.dtype)
    marks = torch.stack([coarse, (bias - coarse).to(k.dtype), torch.full_like(coarse, 1 / scale)], dim=-1)
    slot_k = torch.cat([seen.keys.flatten(0, 1), F.pad(marks.flatten(0, 1), (0, EXTRA - 3))], dim=-1)
    slot_v = F.pad(seen.values.flatten(0, 1), (0, EXTRA))
    all_k, all_v = (torch.cat(part, dim=2) for part in ((band_k, sink_k, slot_k), (band_v, sink_v, slot_v)))
    # A key-value head's queries as those of one head: its keys need no copies, and products are larger.
    kv_heads, group = k.shape[2], heads // k.shape[2]
    queries = queries.unflatten(1, (kv_heads, group)).flatten(2, 3)
    out = F.scaled_dot_product_attention(queries, all_k, all_v, attn_mask=layout.grouped(group), scale=scale)
    by_token = "(batch chunks) kv_heads (group chunk) dim -> batch (chunks chunk) (kv_heads group) dim"
    return rearrange(out[..., :dim], by_token, batch=batch, group=group)[:, :tokens]


def _bands(x: Tensor, before: Tensor | None, layout: DenseSlots) -> Tensor:
    """x [batch, tokens, heads, dim] as overlapping bands [batch * chunks, heads, window + chunk, dim]."""
    batch, tokens, heads, dim = x.shape
    window = layout.window
    if before is None:
        before = x.new_zeros(batch, window, heads, dim)
    x = torch.cat([before, x, x.new_zeros(batch, -tokens % layout.chunk, heads, dim)], dim=1)
    bands = x.unfold(1, window + layout.chunk, layout.chunk)
    return rearrange(bands, "batch chunks heads dim keys -> (batch chunks) heads keys dim")
