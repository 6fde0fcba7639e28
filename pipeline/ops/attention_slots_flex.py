"""Attention to a window and slots on CUDA through FlexAttention.

The band is one BlockMask over the step's own tokens, so that no key is copied for the chunks that see it; slots are a
second, of all chunks after each other, to whose logits a `score_mod` adds the logarithm of their tokens. A query's
shift of all its slots goes to their log-sum-exp, and both are merged with the sinks in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.ops import attention_flex
from pipeline.ops.attention_flex import block_mask, own_block_mask
from pipeline.ops.rope import Rotation, rotate
from pipeline.ops.slots import SlotKeys

EMPTY = -1e4
"""What stands in the place of the logarithm of no tokens: finite, for chunks all of whose slots are empty, and exp() of
it is 0."""


@dataclass(frozen=True, eq=False)
class FlexSlots:
    """What the queries of one step see."""

    band: BlockMask
    slots: BlockMask
    own: Tensor
    """[batch, tokens] bool: in the document of their chunk's first, whose slots are theirs."""
    visible: Tensor
    """[batch, chunks, chunk, sinks] bool."""

    @classmethod
    def build(
        cls, segment_ids: Tensor, carry_ids: Tensor | None, own: Tensor, visible: Tensor, *, window: int, slots: int
    ) -> FlexSlots:
        """Of the documents of the step's tokens [batch, tokens] and of the window before them [batch, window], if there
        is one, and of `own` [batch, chunks, chunk] and `visible` as above."""
        tokens, (chunks, chunk) = segment_ids.shape[1], own.shape[1:]
        # The first query of a chunk sees `window` tokens besides itself.
        band = block_mask(segment_ids, carry_ids, window + 1, chunk)
        behind = own_block_mask((tokens, chunk), (chunks * slots, slots), segment_ids.device)
        return cls(band, behind, own.flatten(1)[:, :tokens], visible)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: FlexSlots,
    rotation: Rotation,
    earlier: tuple[Tensor, Tensor] | None,
    seen: SlotKeys,
    scale: float,
) -> Tensor:
    """Shapes as in `attention_slots.slot_attention`; q before RoPE, k after it, like `earlier`, the keys and values of
    the window before the step."""
    if earlier is not None:
        k, v = (torch.cat(pair, dim=1) for pair in zip(earlier, (k, v), strict=True))
    turned = rotate(q, rotation)
    band = attention_flex.attend(turned, k, v, layout.band, scale)
    bias = torch.where(seen.counts > 0, seen.counts.clamp_min(1).log(), EMPTY)
    keys, values = (x.transpose(2, 3).flatten(1, 2) for x in (seen.keys, seen.values))
    bias = bias.transpose(1, 2).flatten(2, 3).to(torch.promote_types(q.dtype, torch.float32))
    out, total = attention_flex.attend(turned, keys, values, layout.slots, scale, bias)
    total = (total + seen.shift.transpose(1, 2)).masked_fill(~layout.own[:, None], -math.inf)
    return attention_flex.merged([band, (out, total)], q, rotation, seen.sink_k, seen.sink_v, layout.visible, scale)
