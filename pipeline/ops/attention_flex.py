"""Attention on CUDA through FlexAttention (https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html).

Windows, documents and the carry are one BlockMask, so tiles that no query can see cost nothing. FlexAttention returns a
differentiable log-sum-exp; the sinks, whose queries are rotated differently, are merged with it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from pipeline.ops.attention_sinks import SinkPlan, WindowCarry, blocks
from pipeline.ops.fuse import fused
from pipeline.ops.rope import Rotation, rotate, turn

TILE = 128


def block_mask(segment_ids: Tensor, carry_ids: Tensor | None, window: int | None, chunk: int = 1) -> BlockMask:
    """What the queries of one step see: causal, within documents, and within `window` if it is not None.

    A window is that of the first token of each `chunk` of queries, whose last ones see as far back as the first.
    segment_ids [batch, tokens] and carry_ids [batch, any] must not decrease along a row. Built from the tiles' ends,
    never from tokens x tokens pairs as `create_block_mask` does (17 GB of booleans for one 128K sequence).
    """
    keys = segment_ids if carry_ids is None else torch.cat((carry_ids, segment_ids), dim=1)
    tokens, length = segment_ids.shape[1], keys.shape[1]
    offset = length - tokens
    reach = length if window is None else window

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + offset - key
        near = (distance >= 0) & (distance - query % chunk < reach)
        return (segment_ids[batch, query] == keys[batch, key]) & near

    q_first, q_last, q_whole = _tile_ends(tokens, segment_ids.device)
    k_first, k_last, k_whole = _tile_ends(length, segment_ids.device)
    q_low, q_high = segment_ids[:, q_first, None], segment_ids[:, q_last, None]
    k_low, k_high = keys[:, None, k_first], keys[:, None, k_last]
    near, far = ((q + offset)[:, None] - k for q, k in ((q_first, k_last), (q_last, k_first)))
    least, most = near - (q_first % chunk)[:, None], far - (q_last % chunk)[:, None]
    some = (far >= 0) & (least < reach) & (k_low <= q_high) & (k_high >= q_low)
    # Ragged tiles always go through the mask: a whole tile's entries are not checked against the sequence's end.
    every = (near >= 0) & (most < reach) & q_whole[:, None] & k_whole & (k_low == q_high) & (k_high == q_low)
    return _of_tiles(some, every, seen, (tokens, length))


def own_block_mask(queries: tuple[int, int], keys: tuple[int, int], device: torch.device) -> BlockMask:
    """Queries in chunks of so many, and keys in as many blocks: each chunk sees the keys of its own block.

    `queries`, `keys`: how many there are, and how many of a chunk or block.
    """
    (tokens, chunk), (length, block) = queries, keys

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // chunk == key // block

    q_first, q_last, q_whole = _tile_ends(tokens, device)
    k_first, k_last, k_whole = _tile_ends(length, device)
    q_low, q_high = (q_first // chunk)[:, None], (q_last // chunk)[:, None]
    k_low, k_high = k_first // block, k_last // block
    some = (q_low <= k_high) & (k_low <= q_high)
    every = (q_low == k_high) & (k_low == q_high) & q_whole[:, None] & k_whole
    return _of_tiles(some[None], every[None], seen, (tokens, length))


def _of_tiles(some: Tensor, every: Tensor, seen: Callable[..., Tensor], lengths: tuple[int, int]) -> BlockMask:
    """`some`, `every` [batch, q_tiles, kv_tiles] bool: a tile has a pair that is seen, and no other pairs."""
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(every), BLOCK_SIZE=TILE, mask_mod=seen, seq_lengths=lengths
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
    return attend(rotate(q, rotation), rotate(k, rotation), v, mask, scale)[0].transpose(1, 2)


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
    found = attend(rotate(q, rotation), keys, values, mask, scale)
    if sinks is None:
        return found[0].transpose(1, 2)
    return merged(
        [found],
        q,
        sinks.query_rotation,
        sinks.keys(k, carry.sink_k if carry else None),
        sinks.values(v, carry.sink_v if carry else None),
        sinks.visible,
        scale,
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output [batch, heads, tokens, dim], log-sum-exp [batch, heads, tokens] float32) of q, k after RoPE and v
    [batch, tokens, heads, dim]; `bias` [batch, kv_heads, keys], a constant, is added to the logits of the keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _fused_flex(q, k, v, mask, scale, bias)


def merged(
    parts: Sequence[tuple[Tensor, Tensor]],
    q: Tensor,
    rotation: Rotation,
    sink_k: Tensor,
    sink_v: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """One softmax over keys of which each part has seen some, and the sinks of each block of queries.

    Args:
        parts: outputs and log-sum-exps as `attend` gives them; that of the first part is finite.
        q: [batch, tokens, heads, dim] before RoPE, like the output.
        rotation: of the queries that meet the sinks.
        sink_k, sink_v: [batch, blocks, sinks, kv_heads, dim], after RoPE.
        visible: [batch, blocks, block, sinks] bool.
        scale: of the logits.
    """
    # Fused, the float32 copies of q and outputs never reach memory, and backward keeps what is in the model's dtype.
    merge = fused(_merge) if q.is_cuda else _merge
    outs, sums = zip(*parts, strict=True)
    return merge([out.transpose(1, 2) for out in outs], [x.transpose(1, 2) for x in sums], q, *rotation, sink_k, sink_v,
                 visible, scale)  # fmt: skip


def _merge(
    outs: Sequence[Tensor],
    sums: Sequence[Tensor],
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    visible: Tensor,
    scale: float,
) -> Tensor:
    """`merged` of outs [batch, tokens, heads, dim] and their log-sum-exps [batch, tokens, heads], in float32."""
    tokens, block, (heads, dim), count = q.shape[1], visible.shape[2], sink_k.shape[-2:], len(outs)
    precise = sums[0].dtype
    turned = blocks(turn(q, cos, sin).to(precise), block, 0).unflatten(3, (heads, -1))
    logits = torch.einsum("bnlhgd,bnshd->bnlhgs", turned, sink_k.to(precise)) * scale
    logits = logits.masked_fill(~visible[:, :, :, None, None], -torch.inf)
    # Every query sees itself, so its window's log-sum-exp is finite and so is the joint softmax.
    others = [blocks(x, block, 0).unflatten(3, (heads, -1))[..., None] for x in sums]
    weights = torch.softmax(torch.cat((*others, logits), dim=-1), dim=-1)
    joint = torch.einsum("bnlhgs,bnshd->bnlhgd", weights[..., count:], sink_v.to(precise))
    for index, out in enumerate(outs):
        joint = joint + blocks(out.to(precise), block, 0).unflatten(3, (heads, -1)) * weights[..., index : index + 1]
    return joint.reshape(q.shape[0], -1, q.shape[2], dim)[:, :tokens].to(outs[0].dtype)


def _fused_flex(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    # Uncompiled, FlexAttention materialises every score; an error is better than running out of memory in its place.
    found: tuple[Tensor, Tensor] = fused(_flex, fullgraph=True)(q, k, v, mask, scale, bias)
    return found


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[batch, head // group, key]

    out, aux = flex_attention(
        q, k, v, None if bias is None else biased, mask, scale, group > 1, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    return out, aux.lse
