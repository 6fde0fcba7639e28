"""Attention over long sequences of packed documents: `full`, or `window` with attention sinks and a carry.

It runs after the Ulysses exchange: every rank holds the whole sequence and a part of the heads. q and k come before
RoPE. What depends only on where documents lie (masks, rotations, indices) is a plan, made once per batch and shared by
all layers:

    backend = choose_attention("window", sinks, device.type, dtype, head_dim)
    plan = plan_window_attention(segment_ids, positions, rope=rope, window=window, sinks=sinks, carry=carries[0],
                                 backend=backend, dtype=dtype)
    for layer, carry in zip(layers, carries):
        out, carry = window_attention(q, k, v, plan, carry)

Backends: `sdpa` on a CPU; on CUDA `flex`, and `flash2`, `flash3`, `flash4` when they are installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pipeline.ops import attention_bands, attention_flash, attention_flex
from pipeline.ops.attention_bands import BandPlan, Documents
from pipeline.ops.attention_flash import VarlenPlan
from pipeline.ops.attention_sinks import CarryPlan, SinkPlan, WindowCarry, empty_carry
from pipeline.ops.rope import Rope, Rotation, rotate

__all__ = [
    "AttentionPlan",
    "Rope",
    "WindowCarry",
    "choose_attention",
    "empty_carry",
    "full_attention",
    "plan_full_attention",
    "plan_window_attention",
    "window_attention",
]

BACKENDS = ("sdpa", "flash4", "flash3", "flash2", "flex")
"""In the order in which `auto` prefers them."""

Kind = Literal["full", "window"]


def choose_attention(
    kind: Kind, sinks: int, device_type: str, dtype: torch.dtype, head_dim: int, requested: str = "auto"
) -> str:
    """The backend's name, for the plan and for the log.

    Raises ValueError where `requested` cannot do it, naming why and what to use instead.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"attention backend {requested!r} does not exist: use auto, {', '.join(BACKENDS)}")
    refusals = {name: _refusal(name, kind, sinks, device_type, dtype, head_dim) for name in BACKENDS}
    able = [name for name in BACKENDS if refusals[name] is None]
    if requested == "auto":
        if able:
            return able[0]
        nearest = "sdpa" if device_type == "cpu" else "flex"
        raise ValueError(f"no attention backend for {device_type}: {nearest} {refusals[nearest]}")
    if requested in able:
        return requested
    instead = f"use {' or '.join(able)}" if able else "no other backend can either"
    raise ValueError(f"attention backend {requested} {refusals[requested]}: {instead}")


def _refusal(name: str, kind: Kind, sinks: int, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot do it; None if it can."""
    needed = "cpu" if name == "sdpa" else "cuda"
    if device_type != needed:
        return f"runs on {needed}, not on {device_type}"
    if name == "sdpa":
        return None
    if name == "flex":
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"has no {_name(dtype)}"
        return None if head_dim >= 16 else f"needs a head dimension of 16 or more, not {head_dim}"
    if kind == "window" and sinks > 0:
        return "has no differentiable log-sum-exp, which attention sinks need"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"has only float16 and bfloat16, not {_name(dtype)}"
    widest = 128 if name == "flash4" else 256
    if head_dim % 8 or head_dim > widest:
        return f"needs a head dimension that is a multiple of 8 up to {widest}, not {head_dim}"
    if torch.cuda.is_available():
        lowest, highest = attention_flash.CAPABILITIES[name]
        major = torch.cuda.get_device_capability()[0]
        if not lowest <= major <= highest:
            return f"does not run on GPUs of compute capability {major}"
    if attention_flash.varlen_function(name) is None:
        return f"is not installed (no {attention_flash.MODULES[name]}.flash_attn_varlen_func)"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What all layers of one step share. Made by `plan_full_attention` or `plan_window_attention`."""

    kind: Kind
    backend: str
    shape: tuple[int, int]
    """(batch, tokens)."""
    rotation: Rotation
    layout: BandPlan | BlockMask | VarlenPlan | Documents
    """Who sees whom, in the backend's own form."""
    window: int | None = None
    carry_rotation: Rotation | None = None
    """None when the step has no carry."""
    sinks: SinkPlan | None = None
    """None when there are none, or (on a CPU) when no query of this step is beyond its window."""
    carry: CarryPlan | None = None


def plan_full_attention(
    segment_ids: Tensor, positions: Tensor, *, rope: Rope, backend: str, dtype: torch.dtype
) -> AttentionPlan:
    """The plan of causal attention within documents, for every layer of one step.

    Args:
        segment_ids: [batch, tokens] int64, the document of each token; ids do not decrease along a row.
        positions: [batch, tokens] int64, positions within the document.
        rope: the model's rotary embedding.
        backend: from `choose_attention`.
        dtype: of q, k and v.
    """
    _check_tokens(segment_ids, positions)
    rotation = rope.rotation(positions, dtype)
    layout: BlockMask | VarlenPlan | Documents
    if backend == "sdpa":
        layout = Documents.build(segment_ids, rotation)
    elif backend == "flex":
        layout = attention_flex.block_mask(segment_ids, None, None)
    elif backend in attention_flash.MODULES:
        layout = VarlenPlan.build(segment_ids, None)
    else:
        raise ValueError(f"attention backend {backend!r} does not exist: take it from choose_attention")
    batch, tokens = segment_ids.shape
    return AttentionPlan("full", backend, (batch, tokens), rotation, layout)


def plan_window_attention(
    segment_ids: Tensor,
    positions: Tensor,
    *,
    rope: Rope,
    window: int,
    sinks: int,
    carry: WindowCarry | None,
    backend: str,
    dtype: torch.dtype,
) -> AttentionPlan:
    """The plan of windowed attention, for every layer of one step.

    Args:
        segment_ids: [batch, tokens] int64 >= 0, the document's ordinal in its stream: it does not decrease along a row,
            is unique per document, and stays the same in the next step when the document goes on.
        positions: [batch, tokens] int64, positions within the document; they go on across steps.
        rope: the model's rotary embedding.
        window: keys that a query sees, itself included; tokens.
        sinks: first tokens of a document that its later queries see as well; 0 for none.
        carry: that of any layer (only its ids and positions are read), or None where nothing came before.
        backend: from `choose_attention`.
        dtype: of q, k and v.
    """
    _check_tokens(segment_ids, positions)
    if window < 1 or sinks < 0:
        raise ValueError(f"window must be at least 1 and sinks at least 0, got window {window} and sinks {sinks}")
    before = None
    if carry is not None:
        want = (segment_ids.shape[0], window, sinks)
        have = (*carry.segment_ids.shape, carry.sink_k.shape[1])
        if have != want:
            raise ValueError(f"carry is for (batch, window, sinks) = {have}, this step for {want}")
        before = (carry.segment_ids, carry.positions)
    carry_ids = before[0] if before else None

    layout: BandPlan | BlockMask | VarlenPlan
    block = min(window, segment_ids.shape[1])
    if backend == "sdpa":
        layout = BandPlan.build(segment_ids, carry_ids, window=window, dtype=dtype)
        block = layout.block
    elif backend == "flex":
        layout = attention_flex.block_mask(segment_ids, carry_ids, window)
    elif backend in attention_flash.MODULES:
        if sinks:
            raise ValueError(f"attention backend {backend} cannot do sinks: use flex")
        layout = VarlenPlan.build(segment_ids, carry_ids)
    else:
        raise ValueError(f"attention backend {backend!r} does not exist: take it from choose_attention")

    sink_plan = None
    if sinks:
        sink_plan = SinkPlan.build(
            segment_ids, positions, carry_ids, rope, window=window, sinks=sinks, block=block, dtype=dtype
        )
        # On a GPU the question would wait for the device, which costs more than a few empty logits.
        if segment_ids.device.type == "cpu" and not sink_plan.visible.any():
            sink_plan = None
    return AttentionPlan(
        "window",
        backend,
        (segment_ids.shape[0], segment_ids.shape[1]),
        rope.rotation(positions, dtype),
        layout,
        window,
        rope.rotation(before[1], dtype) if before else None,
        sink_plan,
        CarryPlan.build(segment_ids, positions, before, window=window, sinks=sinks),
    )


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, carry: WindowCarry | None, *, scale: float | None = None
) -> tuple[Tensor, WindowCarry]:
    """Sliding-window attention with attention sinks (StreamingLLM, arXiv 2309.17453) and RoPE (arXiv 2104.09864).

    A query at document position p sees, of its own document and under one softmax, the keys at p' <= p with
    p - p' < window at their true distance, and the first `sinks` tokens j with p - j >= window at the distance
    min(p, window + sinks - 1) - j. Differentiable in q, k and v; the carry is a constant.

    Args:
        q: [batch, tokens, heads, dim], before RoPE.
        k, v: [batch, tokens, kv_heads, dim], k before RoPE; heads is a multiple of kv_heads.
        plan: from `plan_window_attention`.
        carry: this layer's, from the step before; None if and only if the plan was made without one.
        scale: of the logits; 1 / sqrt(dim) when None.

    Returns:
        Attention output [batch, tokens, heads, dim] and the carry for the next step.
    """
    scale = _check_call("window", q, k, v, plan, scale)
    if (carry is None) != (plan.carry_rotation is None):
        raise ValueError("the plan and the call must both have a carry or both have none")
    rotated = carry
    if carry is not None and plan.carry_rotation is not None:
        rotated = carry._replace(k=rotate(carry.k, plan.carry_rotation))
    layout = plan.layout
    if isinstance(layout, BandPlan):
        out = attention_bands.window_attention(q, k, v, rotated, layout, plan.rotation, plan.sinks, scale)
    elif isinstance(layout, BlockMask):
        out = attention_flex.window_attention(q, k, v, rotated, layout, plan.rotation, plan.sinks, scale)
    else:
        assert isinstance(layout, VarlenPlan)
        out = attention_flash.attention(q, k, v, rotated, layout, plan.rotation, plan.window, plan.backend, scale)
    assert plan.carry is not None
    return out, plan.carry.cut(k, v, carry)


def full_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None) -> Tensor:
    """Causal attention within documents, with RoPE; it does not reach into an earlier step.

    Args:
        q: [batch, tokens, heads, dim], before RoPE.
        k, v: [batch, tokens, kv_heads, dim], k before RoPE; heads is a multiple of kv_heads.
        plan: from `plan_full_attention`.
        scale: of the logits; 1 / sqrt(dim) when None.

    Returns:
        [batch, tokens, heads, dim].
    """
    scale = _check_call("full", q, k, v, plan, scale)
    layout = plan.layout
    if isinstance(layout, Documents):
        return attention_bands.full_attention(q, k, v, layout, plan.rotation, scale)
    if isinstance(layout, BlockMask):
        return attention_flex.full_attention(q, k, v, layout, plan.rotation, scale)
    assert isinstance(layout, VarlenPlan)
    return attention_flash.attention(q, k, v, None, layout, plan.rotation, None, plan.backend, scale)


def _check_tokens(segment_ids: Tensor, positions: Tensor) -> None:
    if segment_ids.dim() != 2 or segment_ids.shape != positions.shape or segment_ids.shape[1] == 0:
        have = f"{tuple(segment_ids.shape)} and {tuple(positions.shape)}"
        raise ValueError(f"segment_ids and positions must both be [batch, tokens] with a token, got {have}")


def _check_call(kind: Kind, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float | None) -> float:
    """The scale to use, after the checks that need no look at the data."""
    if plan.kind != kind:
        raise ValueError(f"{kind}_attention was given a plan for {plan.kind} attention")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or tuple(q.shape[:2]) != plan.shape:
        have = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"q, k and v must be [batch, tokens, heads, dim] with the plan's {plan.shape}, got {have}")
    if k.shape[:2] != q.shape[:2] or q.shape[2] % k.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)}: heads must be a multiple of key-value heads")
    dim = 2 * plan.rotation.cos.shape[-1]
    if q.shape[3] != dim:
        raise ValueError(f"the rotary embedding is for a head dimension of {dim}, q has {q.shape[3]}")
    return 1 / math.sqrt(dim) if scale is None else scale
