"""Full attention on the native kernel of kernels/slot_attention: a window of everything, without slots and sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.ops.attention_slots_native import NativeSlots, slot_attention, takes
from pipeline.ops.rope import Rotation
from pipeline.ops.slots import SlotKeys

CHUNK = 512
"""Queries for which the keys before them are packed once."""


def takes_full(q: Tensor) -> bool:
    """Whether the kernel is used for q, k and v like q: in bfloat16, where the processor multiplies pairs of them. Only
    there is it known to be faster than SDPA."""
    pairs = q.dtype == torch.bfloat16 and takes(q.device, q.dtype, q.shape[-1])
    return pairs and torch.ops.mnemos.cpu_isa() == "avx512_bf16"


def causal_layout(documents: Tensor, turns: Rotation) -> NativeSlots:
    """For `causal_attention`: documents [batch, tokens], and the rotations of their tokens."""
    (batch, tokens), half = documents.shape, turns.cos.shape[-1]
    chunks = -(-tokens // CHUNK)
    nothing = documents.new_zeros((batch, chunks, 0), dtype=torch.bool)
    places, back = (turns.cos.new_zeros(shape) for shape in ((batch, chunks, 1, half), (1, half)))
    return NativeSlots.build(tokens, CHUNK, documents, nothing, turns, Rotation(places, places), Rotation(back, back))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, layout: NativeSlots, scale: float) -> Tensor:
    """Attention to all tokens of a document up to a query's own.

    q [batch, tokens, heads, dim], k and v [batch, tokens, kv_heads, dim], before RoPE.
    """
    (batch, chunks), (kv_heads, dim) = layout.sinks_seen.shape[:2], k.shape[2:]
    slots = k.new_zeros(batch, chunks, kv_heads, 0, dim)
    counts = slots.new_zeros(slots.shape[:4], dtype=torch.float32)
    sinks = k.new_zeros(batch, chunks, 0, kv_heads, dim)
    shift = q.new_zeros(q.shape[:3], dtype=torch.float32)
    seen = SlotKeys(slots, slots, counts, shift, sinks, sinks)
    return slot_attention(q, k, v, layout, None, seen, counts, None, scale)
