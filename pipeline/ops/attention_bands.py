"""Attention on a CPU: SDPA over block bands, so that time and memory per token do not grow with the sequence.

FlexAttention has no backward pass on a CPU, and one masked square would be tokens x tokens. Here a block of queries
meets only the keys that its window can reach, a strided view of the sequence.

Sinks join the band's softmax through its log-sum-exp. The fused kernel returns one, and its backward pass is exact for
*part* of a softmax when it is given the output and the log-sum-exp of the *whole*, as ring attention (arXiv 2310.01889)
does across devices. Measured on two cores, forward and backward, against SDPA with the sink logits as a differentiable
bias (which takes its unfused path): 42 ms against 52 ms (8,192 tokens, 4 heads of 32, window 128), 202 ms against
376 ms (4,096 tokens, 8 heads of 64, window 512).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops.attention_full_native import causal_attention, causal_layout, takes_full
from pipeline.ops.attention_sinks import NO_TOKEN, PADDING, SinkPlan, WindowCarry, blocks
from pipeline.ops.attention_slots_native import NativeSlots
from pipeline.ops.rope import Rotation, rotate

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, eq=False)
class BandPlan:
    """The masks of every block of queries: it sees `reach` keys before it and its own block, as far as both agree."""

    block: int
    reach: int
    mask: Tensor
    """[batch * blocks, 1, block, reach + block]: 0 where a query sees a key, else -inf."""

    @classmethod
    def build(cls, segment_ids: Tensor, carry_ids: Tensor | None, *, window: int, dtype: torch.dtype) -> BandPlan:
        tokens = segment_ids.shape[1]
        block = block_length(tokens, window)
        queries = blocks(segment_ids, block, PADDING)
        count = queries.shape[1]
        # Without a carry nothing lies before the first token, and a short sequence need not reach back a whole window.
        reach = min(window, (count - 1) * block) if carry_ids is None else window
        keys = F.pad(queries.flatten(1), (reach, 0), value=NO_TOKEN)
        if carry_ids is not None:
            keys[:, :reach] = carry_ids
        distance = torch.arange(reach, reach + block)[:, None] - torch.arange(reach + block)
        seen = (queries[..., None] == keys.unfold(1, reach + block, block)[:, :, None]) & (distance >= 0)
        seen &= distance < window
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
        return cls(block, reach, mask.flatten(0, 1)[:, None])

    def queries(self, q: Tensor) -> Tensor:
        """q [batch, tokens, heads, dim] as [batch * blocks, heads, block, dim]."""
        return rearrange(blocks(q, self.block, 0), "batch blocks block heads dim -> (batch blocks) heads block dim")

    def keys(self, k: Tensor, before: Tensor | None) -> Tensor:
        """k [batch, tokens, kv_heads, dim] as overlapping bands [batch * blocks, kv_heads, reach + block, dim]."""
        batch, tokens, heads, dim = k.shape
        padding = -tokens % self.block
        if self.reach or padding:
            if before is None:
                before = k.new_zeros(batch, self.reach, heads, dim)
            k = torch.cat((before.to(k.dtype), k, k.new_zeros(batch, padding, heads, dim)), dim=1)
        bands = k.unfold(1, self.reach + self.block, self.block)
        return rearrange(bands, "batch blocks kv_heads dim keys -> (batch blocks) kv_heads keys dim")


def block_length(tokens: int, window: int) -> int:
    """Queries per block. A band computes reach + block keys per query for window keys of use: half a window wastes less
    than a whole one, a quarter gains no more, and below 64 the kernel's own tiles are not full. Blocks are as even as
    they can be: a last one of a few tokens costs as much as the others."""
    most = min(tokens, window, max(window // 2, 64))
    return -(-tokens // -(-tokens // most))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    carry: WindowCarry | None,
    plan: BandPlan,
    rotation: Rotation,
    sinks: SinkPlan | None,
    scale: float,
) -> Tensor:
    """Windowed attention; shapes as in `attention.window_attention`, q and k before RoPE, carry.k after it."""
    batch, tokens = q.shape[:2]
    mask = plan.mask.to(q.dtype)
    band = (
        plan.queries(rotate(q, rotation)),
        plan.keys(rotate(k, rotation), carry.k if carry else None),
        plan.keys(v, carry.v if carry else None),
    )
    if sinks is None:
        out = F.scaled_dot_product_attention(*band, attn_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    else:
        by_block = "batch blocks sinks kv_heads dim -> (batch blocks) kv_heads sinks dim"
        out = _BandWithSinks.apply(
            *band,
            plan.queries(rotate(q, sinks.query_rotation)),
            rearrange(sinks.keys(k, carry.sink_k if carry else None), by_block),
            rearrange(sinks.values(v, carry.sink_v if carry else None), by_block),
            mask,
            sinks.visible.flatten(0, 1),
            scale,
        )
    out = rearrange(out, "(batch blocks) heads block dim -> batch (blocks block) heads dim", batch=batch)
    return out[:, :tokens]


class _BandWithSinks(torch.autograd.Function):
    """One softmax over a band of keys and a few sinks.

    q, sink_q [blocks, heads, block, dim]; k, v [blocks, kv_heads, keys, dim]; sink_k, sink_v [blocks, kv_heads, sinks,
    dim]; mask [blocks, 1, block, keys] additive; visible [blocks, block, sinks] bool.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink_q: Tensor,
        sink_k: Tensor,
        sink_v: Tensor,
        mask: Tensor,
        visible: Tensor,
        scale: float,
    ) -> Tensor:
        out, lse = _flash(q, k, v, attn_mask=mask, scale=scale)
        # The kernel keeps its logits in float32 for half precision; the sinks' must not be coarser.
        groups = (k.shape[1], q.shape[1] // k.shape[1])
        logits = torch.matmul(_grouped(sink_q, groups, lse), _shared(sink_k, lse).transpose(-1, -2)).mul_(scale)
        logits.masked_fill_(~visible[:, None, None], -math.inf)
        joint = torch.logaddexp(lse.unflatten(1, groups), torch.logsumexp(logits, dim=-1))
        weights = logits.sub_(joint[..., None]).exp_()
        joint = joint.flatten(1, 2)
        out = out * torch.exp(lse - joint)[..., None] + torch.matmul(weights, _shared(sink_v, lse)).flatten(1, 2)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_q, sink_k, sink_v, mask, weights, out, joint)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink_q, sink_k, sink_v, mask, weights, out, joint = ctx.saved_tensors
        grad_band = _flash_backward(grad, q, k, v, out, joint, 0.0, False, attn_mask=mask, scale=ctx.scale)
        groups = weights.shape[1:3]
        mean = (grad.to(joint.dtype) * out).sum(-1, keepdim=True).unflatten(1, groups)
        grad = _grouped(grad, groups, joint)
        grad_v = torch.matmul(weights.transpose(-1, -2), grad).sum(2)
        grad_logits = weights * (torch.matmul(grad, _shared(sink_v, joint).transpose(-1, -2)) - mean) * ctx.scale
        grad_q = torch.matmul(grad_logits, _shared(sink_k, joint)).flatten(1, 2)
        grad_k = torch.matmul(grad_logits.transpose(-1, -2), _grouped(sink_q, groups, joint)).sum(2)
        return *grad_band, grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def _grouped(x: Tensor, groups: tuple[int, int], like: Tensor) -> Tensor:
    return x.to(like.dtype).unflatten(1, groups)


def _shared(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)[:, :, None]


@dataclass(frozen=True, eq=False)
class Documents:
    """Who sees whom in full attention."""

    segment_ids: Tensor
    rotation: Rotation
    lengths: list[int]
    """Of all documents, row after row."""

    @classmethod
    def build(cls, segment_ids: Tensor, rotation: Rotation) -> Documents:
        """Of the documents of [batch, tokens], and their tokens' rotations."""
        return cls(segment_ids, rotation, document_lengths(segment_ids))

    @cached_property
    def native(self) -> NativeSlots:
        """For the native kernel."""
        return causal_layout(self.segment_ids, self.rotation)


def full_attention(q: Tensor, k: Tensor, v: Tensor, layout: Documents, rotation: Rotation, scale: float) -> Tensor:
    """Causal attention within documents: the native kernel where `takes_full` says so and nothing is differentiated,
    else one SDPA call per document.

    q [batch, tokens, heads, dim], k and v [batch, tokens, kv_heads, dim] before RoPE; a causal call needs no mask.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not learns and takes_full(q):
        return causal_attention(q, k, v, layout.native, scale)
    gqa = q.shape[2] != k.shape[2]
    # One split and one cat: slices would make every document's backward pass as long as the batch.
    documents = [x.flatten(0, 1).split(layout.lengths) for x in (rotate(q, rotation), rotate(k, rotation), v)]
    outs = []
    for document in zip(*documents, strict=True):
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in document)
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True, scale=scale, enable_gqa=gqa)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).view(q.shape)


def document_lengths(segment_ids: Tensor) -> list[int]:
    """The lengths of all documents of segment_ids [batch, tokens], row after row."""
    return [n for row in segment_ids for n in torch.unique_consecutive(row, return_counts=True)[1].tolist()]
