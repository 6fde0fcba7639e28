"""Attention on CUDA through FlexAttention (https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html).

Windows, documents and the carry are one BlockMask, so tiles that no query can see cost nothing. FlexAttention returns a
differentiable log-sum-exp; the sinks, whose queries are rotated differently, are merged with it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention

from pipeline.ops.attention_sinks import SinkPlan, WindowCarry, blocks
from pipeline.ops.fuse import fused
from pipeline.ops.rope import Rotation, rotate, turn

TILE = 128


def block_mask(segment_ids: Tensor, carry_ids: Tensor | None, window: int | None) -> BlockMask:
    """What the queries of one step see: causal, within documents, and within `window` if it is not None.

    segment_ids [batch, tokens] and carry_ids [batch, window] must not decrease along a row. Built from the tiles' ends,
    never from tokens x tokens pairs as `create_block_mask` does (17 GB of booleans for one 128K sequence).
    """
    keys = segment_ids if carry_ids is None else torch.cat((carry_ids, segment_ids), dim=1)
    tokens, length = segment_ids.shape[1], keys.shape[1]
    offset = length - tokens
    reach = length if window is None else window

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        return (segment_ids[batch, query] == keys[batch, key]) & (distance >= 0) & (distance < reach)

    q_first, q_last, q_whole = _tile_ends(tokens, segment_ids.device)
    k_first, k_last, k_whole = _tile_ends(length, segment_ids.device)
    q_low, q_high = segment_ids[:, q_first, None], segment_ids[:, q_last, None]
    k_low, k_high = keys[:, None, k_first], keys[:, None, k_last]
    near = (q_first + offset)[:, None] - k_last
    far = (q_last + offset)[:, None] - k_first
    some = (far >= 0) & (near < reach) & (k_low <= q_high) & (k_high >= q_low)
    # Ragged tiles always go through the mask: a whole tile's entries are not checked against the sequence's end.
    every = (near >= 0) & (far < reach) & q_whole[:, None] & k_whole & (k_low == q_high) & (k_high == q_low)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=TILE,
        mask_mod=seen,
        seq_lengths=(tokens, length),
    )


def _tile_ends(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    first = torch.arange(0, length, TILE, device=device)
    last = first + TILE - 1
    return first, last.clamp(max=length - 1), last < length


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """tiles [batch, q_tiles, kv_tiles] bool as FlexAttention wants them: counts, and indices, true ones first."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def full_attention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, rotation: Rotation, scale: float) -> Tensor:
    """Causal attention within documents; shapes as in `attention.full_attention`, q and k before RoPE."""
    return _attend(rotate(q, rotation), rotate(k, rotation), v, mask, scale)[0].transpose(1, 2)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carry: WindowCarry | None,
    mask: BlockMask,
    rotation: Rotation,
    sinks: SinkPlan | None,
    scale: float,
) -> Tensor:
    """Windowed attention; shapes as in `attention.window_attention`, q and k before RoPE, carry.k after it."""
    keys, values = rotate(k, rotation), v
    if carry is not None:
        keys = torch.cat((carry.k.to(k.dtype), keys), dim=1)
        values = torch.cat((carry.v.to(v.dtype), v), dim=1)
    out, lse = _attend(rotate(q, rotation), keys, values, mask, scale)
    out = out.transpose(1, 2)
    if sinks is None:
        return out
    # Fused, the float32 copies of q and out never reach memory, and backward keeps what is in the model's dtype.
    merge = fused(_merge) if q.is_cuda else _merge
    return merge(
        out,
        lse.transpose(1, 2),
        q,
        *sinks.query_rotation,
        sinks.keys(k, carry.sink_k if carry else None),
        sinks.values(v, carry.sink_v if carry else None),
        sinks.visible,
        scale,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, aux = _fused_flex(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return out, aux.lse


def _merge(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """One softmax over the window, of which `out` and `lse` are known, and the sinks of each block, in float32.

    out, q [batch, tokens, heads, dim]; lse [batch, tokens, heads]; sink_k, sink_v [batch, blocks, sinks, kv_heads,
    dim]; visible [batch, blocks, block, sinks].
    """
    tokens, block, (heads, dim) = q.shape[1], visible.shape[2], sink_k.shape[-2:]
    precise = lse.dtype
    turned = blocks(turn(q, cos, sin).to(precise), block, 0).unflatten(3, (heads, -1))
    logits = torch.einsum("bnlhgd,bnshd->bnlhgs", turned, sink_k.to(precise)) * scale
    logits = logits.masked_fill(~visible[:, :, :, None, None], -torch.inf)
    # Every query sees itself, so its window's log-sum-exp is finite and so is the joint softmax.
    window = blocks(lse, block, 0).unflatten(3, (heads, -1))[..., None]
    weights = torch.softmax(torch.cat((window, logits), dim=-1), dim=-1)
    kept = blocks(out.to(precise), block, 0).unflatten(3, (heads, -1)) * weights[..., :1]
    merged = kept + torch.einsum("bnlhgs,bnshd->bnlhgd", weights[..., 1:], sink_v.to(precise))
    return merged.reshape(q.shape[0], -1, q.shape[2], dim)[:, :tokens].to(out.dtype)


def _fused_flex(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, AuxOutput]:
    # Uncompiled, FlexAttention materialises every score; an error is better than running out of memory in its place.
    return fused(flex_attention, fullgraph=True)(q, k, v, **options)
