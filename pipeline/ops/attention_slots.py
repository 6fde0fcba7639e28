"""Windowed attention with a bounded store of what lies behind the window, under one softmax.

Queries come in chunks. A chunk's queries see, of their own document, all tokens from `window` before the chunk on, the
attention sinks, and the slots (`pipeline.ops.slots`) in which the tokens before those are stored. So a token is stored
when a whole chunk no longer has it in its window. Its distance is the true one until then, and in a slot that of the
slot's newest token, up to a reach that is to lie within what the backbone was trained for. The logit of a slot has the
logarithm of its tokens added. Where nothing lies behind the window, this is `attention.window_attention`.

Backends: on a CPU the native kernel (`attention_slots_native`) where it takes the tensors, else `sdpa`
(`attention_slots_sdpa`); `flex` on CUDA (`attention_slots_flex`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.ops import attention_slots_flex, attention_slots_native, attention_slots_sdpa
from pipeline.ops.attention_sinks import NO_TOKEN, PADDING, SinkIndex, WindowCarry, blocks
from pipeline.ops.attention_slots_flex import FlexSlots
from pipeline.ops.attention_slots_native import NativeSlots
from pipeline.ops.attention_slots_sdpa import DenseSlots
from pipeline.ops.fuse import fused
from pipeline.ops.importance import Importance
from pipeline.ops.rope import Rope, Rotation, one_after_another, rotate, turn
from pipeline.ops.slots import SlotKeys, SlotMaps, Slots, SlotsByChunk, shuffle
from pipeline.ops.store_slots import Backend, store_slots


@dataclass(frozen=True, eq=False)
class SlotPlan:
    """Which keys the chunks of one step see, and which tokens leave each; shared by all layers."""

    window: int
    chunk: int
    layout: DenseSlots | FlexSlots | NativeSlots
    """Who sees whom, in the backend's own form."""
    rotation: Rotation
    """Of the step's tokens, [batch, tokens, 1, dim / 2]."""
    carry_rotation: Rotation | None
    """Of the carried window's tokens."""
    sinks: SinkIndex
    sink_rotation: Rotation
    """[batch, chunks, sinks, 1, dim / 2]."""
    slot_rotation: Rotation
    """Of the position of the first token that a chunk has in its window, [batch, chunks, 1, 1, dim / 2]: a slot turns
    back from it by its age."""
    back: Rotation
    """By age, [reach + 1, dim / 2]."""
    begins_known: Tensor
    """[batch] bool: the first token goes on with the document of the step before, whose slots are its own."""
    goes_on: Tensor
    """[batch, chunks] bool: what follows the chunk belongs to the document of its first token."""
    stored: Tensor
    """[batch, chunks, chunk] bool: of the tokens `window` places before a chunk's, which are stored at its end."""
    order: Tensor
    """[slots + chunk] int64: `pipeline.ops.slots.shuffle`, on the device."""
    segment_ids: Tensor
    """[batch, tokens] int64."""
    kept: Tensor
    """[batch, tokens] bool: which a slot may take, once they are behind the window."""
    reach: int


def plan_slots(
    segment_ids: Tensor,
    positions: Tensor,
    before: tuple[Tensor, Tensor] | None,
    *,
    rope: Rope,
    window: int,
    sinks: int,
    slots: int,
    chunk: int,
    reach: int,
    dtype: torch.dtype,
    backend: Literal["sdpa", "flex", "native"],
) -> SlotPlan:
    """The plan of one step.

    Args:
        segment_ids, positions: [batch, tokens] int64, of the whole sequence; tokens is a multiple of `chunk` in all
            steps but a stream's last, since chunks begin at its multiples.
        before: the same of the last `window` tokens before the step [batch, window]; None where there are none.
        window: tokens before its chunk that a query sees at the least.
        sinks: first tokens of a document, which are never stored.
        slots, chunk: how many, and tokens of a chunk. Raises ValueError for fewer slots than tokens of a chunk.
        reach: positions behind the window at which a slot stands at the most, however old.
        dtype: of q, k and v.
        backend: of attention.
    """
    if not 0 < chunk <= slots:
        raise ValueError(f"{slots} slots cannot take a chunk of {chunk} tokens at once: give at least as many")
    batch, tokens = segment_ids.shape
    # The last step of a stream may be shorter than a chunk, and needs no queries beyond its tokens.
    chunk = min(chunk, tokens)
    device = segment_ids.device
    old_ids, old_positions = before or (segment_ids.new_full((batch, window), NO_TOKEN), positions.new_zeros(()))
    ids = blocks(segment_ids, chunk, PADDING)
    count = ids.shape[1]
    places = blocks(positions, chunk, 0)
    first_ids, first_places = ids[..., 0], places[..., 0]
    all_ids = torch.cat([old_ids, ids.flatten(1)], dim=1)
    all_places = torch.cat([old_positions.expand(batch, window), places.flatten(1)], dim=1)

    own = ids == first_ids[..., None]
    first = torch.arange(0, tokens, chunk, device=device)
    sink_index = SinkIndex.of(first, segment_ids, positions, None if before is None else old_ids, sinks)
    order = torch.arange(sinks, device=device)
    behind = first_places[..., None] - order > window
    sinks_seen = behind & sink_index.present
    visible = own[..., None] & sinks_seen[:, :, None]
    # Right behind the window, as `attention_sinks` has them.
    sink_rotation = rope.rotation((first_places - window - sinks).clamp_min(0)[..., None] + order, dtype)
    rotation = rope.rotation(positions, dtype)
    carry_rotation = None if before is None else rope.rotation(old_positions, dtype)
    slot_rotation, back = rope.rotation((first_places - window)[..., None], dtype), rope.back(reach, device, dtype)
    layout: DenseSlots | FlexSlots | NativeSlots
    carried = None if before is None else old_ids
    if backend == "native":
        documents, turns = segment_ids, rotation
        if carried is not None and carry_rotation is not None:
            documents = torch.cat([carried, documents], dim=1)
            turns = Rotation(*(torch.cat(pair, dim=1) for pair in zip(carry_rotation, rotation, strict=True)))
        layout = NativeSlots.build(window, chunk, documents, sinks_seen, turns, slot_rotation, back)
    elif backend == "flex":
        layout = FlexSlots.build(segment_ids, carried, own, visible, window=window, slots=slots)
    else:
        layout = DenseSlots.build(ids, all_ids, own, visible, slots=slots, dtype=dtype)

    # A step's last chunk cannot know what follows: it stores for the document of its last token.
    next_ids = torch.cat([first_ids[:, 1:], segment_ids[:, -1:]], dim=1)
    leaving_ids, leaving_places = (x[:, : count * chunk].unflatten(1, (count, chunk)) for x in (all_ids, all_places))
    # Of a stream's last step, whose chunk need not be whole, nothing else leaves.
    stored = (leaving_ids == next_ids[..., None]) & (leaving_places >= sinks) & (ids != PADDING)
    return SlotPlan(
        window,
        chunk,
        layout,
        rotation,
        carry_rotation,
        sink_index,
        sink_rotation,
        slot_rotation,
        back,
        old_ids[:, -1] == segment_ids[:, 0],
        next_ids == first_ids,
        stored,
        torch.tensor(shuffle(slots + chunk), device=device),
        segment_ids,
        positions >= sinks,
        reach,
    )


def slots_by_chunk(
    k: Tensor,
    v: Tensor,
    plan: SlotPlan,
    carry: WindowCarry | None,
    slots: Slots,
    importance: Importance | None = None,
    backend: Backend = "auto",
) -> SlotsByChunk:
    """The slots as every chunk of a step finds them, and those after the step.

    k, v [batch, tokens, kv_heads, dim], k before RoPE; `slots` are those of the step before; `importance`
    weighs tokens, which are alike without it.
    """
    earlier_k, earlier_v = (None, None) if carry is None else (carry.k, carry.v)
    leaving_k = blocks(_behind(k.detach(), earlier_k, plan.window), plan.chunk, 0)
    leaving_v = blocks(_behind(v.detach(), earlier_v, plan.window), plan.chunk, 0)
    known = slots.where(plan.begins_known)
    weights = None if importance is None else importance.weights(leaving_k, leaving_v)
    return store_slots(known, leaving_k, leaving_v, weights, plan.stored, plan.goes_on, plan.order, backend=backend)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SlotPlan,
    carry: WindowCarry | None,
    slots: SlotsByChunk,
    maps: SlotMaps | None,
    shift: Tensor,
    scale: float,
) -> Tensor:
    """The output of attention, like q. Differentiable in q, k, v, the maps and the shift; what is carried and stored is
    a constant.

    Args:
        q: [batch, tokens, heads, dim], before RoPE.
        k, v: [batch, tokens, kv_heads, dim], k before RoPE.
        plan: from `plan_slots`.
        carry: of the window, from the step before; None where the plan was made without one.
        slots: from `slots_by_chunk`.
        maps: how they are read; None for as they are.
        shift: [batch, tokens, heads], added to the logits of all slots.
        scale: of the logits.
    """
    sink_k = plan.sinks.gather(k, None if carry is None else carry.sink_k)
    sink_v = plan.sinks.gather(v, None if carry is None else carry.sink_v)
    sink_k = turn(sink_k, *plan.sink_rotation)
    earlier = None if carry is None else (carry.k.to(k.dtype), carry.v.to(v.dtype))
    keys, values, ages = slots.keys.to(k.dtype), slots.values.to(v.dtype), slots.ages
    seen = SlotKeys(keys, values, slots.counts, shift, sink_k, sink_v)
    if isinstance(plan.layout, NativeSlots):
        return attention_slots_native.slot_attention(q, k, v, plan.layout, earlier, seen, ages, maps, scale)
    if maps is not None:
        keys, values = maps.read(keys, values)
        seen = seen._replace(shift=maps.shifted(shift, q))
    if earlier is not None:
        assert plan.carry_rotation is not None
        earlier = rotate(earlier[0], plan.carry_rotation), earlier[1]
    seen = seen._replace(keys=turn_slots(keys, plan.slot_rotation, plan.back, ages), values=values)
    k = rotate(k, plan.rotation)
    if isinstance(plan.layout, FlexSlots):
        return attention_slots_flex.slot_attention(q, k, v, plan.layout, plan.rotation, earlier, seen, scale)
    q = rotate(q, plan.rotation)
    return attention_slots_sdpa.slot_attention(q, k, v, plan.layout, earlier, seen, scale)


def turn_slots(keys: Tensor, place: Rotation, back: Rotation, ages: Tensor) -> Tensor:
    """Keys of slots [..., kv_heads, slots, dim] after RoPE: by `place` [..., 1, 1, dim / 2], turned back by their ages
    [..., kv_heads, slots]; `back` is of `Rope.back`."""
    # Fused, the cosines and sines of every slot never reach memory.
    apply = fused(_turn_slots, dynamic=True) if keys.is_cuda else _turn_slots
    return apply(keys, *place, *back, ages)


def _turn_slots(keys: Tensor, cos: Tensor, sin: Tensor, back_cos: Tensor, back_sin: Tensor, ages: Tensor) -> Tensor:
    index = ages.long().clamp_max(back_cos.shape[0] - 1)
    return turn(keys, *one_after_another(Rotation(cos, sin), Rotation(back_cos[index], back_sin[index])))


def _behind(x: Tensor, before: Tensor | None, window: int) -> Tensor:
    """x [batch, tokens, heads, dim] `window` places later, zeros where nothing came before."""
    if before is None:
        before = x.new_zeros(x.shape[0], window, *x.shape[2:])
    return torch.cat([before.to(x.dtype), x], dim=1)[:, : x.shape[1]]
