"""Windowed attention with a bounded store of what lies behind the window, under one softmax.

Queries come in chunks. A chunk's queries see, of their own document, all tokens from `window` before the chunk on, the
attention sinks, and the slots (`pipeline.ops.slots`) in which the tokens before those are stored. So a token is stored
when a whole chunk no longer has it in its window. Its distance is the true one until then, and in a slot that of the
slot's newest token, up to a reach that is to lie within what the backbone was trained for. The logit of a slot has the
logarithm of its tokens added. Where nothing lies behind the window, this is `attention.window_attention`.

All of it is one call of SDPA over [window, sinks, slots]: what is added to logits stands in extra dimensions of queries
and keys, so that fused kernels need no mask per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pipeline.ops.attention_sinks import NO_TOKEN, PADDING, SinkIndex, WindowCarry, blocks
from pipeline.ops.rope import Rope, Rotation, one_after_another, rotate, turn
from pipeline.ops.slots import Slots, SlotsByChunk, shuffle
from pipeline.ops.store_slots import Backend, store_slots

EXTRA = 8
"""Dimensions that are added to queries and keys: three are used, and kernels want multiples of eight."""
EMPTY = -3e4
"""What stands in the place of the logarithm of no tokens, in units of a key's extra dimension: finite in float16, and
exp() of it is 0 for every scale of logits in use."""


@dataclass(frozen=True, eq=False)
class SlotPlan:
    """Which keys the chunks of one step see, and which tokens leave each; shared by all layers."""

    window: int
    chunk: int
    mask: Tensor
    """[batch * chunks, 1, chunk, window + chunk + sinks + slots] additive: 0 where a query sees a key, else -inf."""
    rotation: Rotation
    """Of the step's tokens, [batch, tokens, 1, dim / 2]."""
    carry_rotation: Rotation | None
    """Of the carried window's tokens."""
    sinks: SinkIndex | None
    sink_rotation: Rotation | None
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
    masks: dict[int, Tensor] = field(default_factory=dict)
    """What `grouped` has made."""

    def grouped(self, group: int) -> Tensor:
        """The mask of `group` heads that follow each other as queries of one."""
        if group not in self.masks:
            self.masks[group] = self.mask.repeat(1, 1, group, 1)
        return self.masks[group]


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

    offsets = torch.arange(window + chunk, device=device)
    distance = offsets[window:, None] - offsets
    band = (ids[..., None] == all_ids.unfold(1, window + chunk, chunk)[:, :, None]) & (distance >= 0)
    parts = [band]
    own = (ids == first_ids[..., None])[..., None]
    sink_index = sink_rotation = None
    if sinks:
        first = torch.arange(0, tokens, chunk, device=device)
        sink_index = SinkIndex.of(first, segment_ids, positions, None if before is None else old_ids, sinks)
        order = torch.arange(sinks, device=device)
        behind = first_places[..., None] - order > window
        parts.append(own & (behind & sink_index.present)[:, :, None])
        # Right behind the window, as `attention_sinks` has them.
        sink_rotation = rope.rotation((first_places - window - sinks).clamp_min(0)[..., None] + order, dtype)
    parts.append(own.expand(-1, -1, -1, slots))
    seen = torch.cat(parts, dim=-1).flatten(0, 1)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)

    # A step's last chunk cannot know what follows: it stores for the document of its last token.
    next_ids = torch.cat([first_ids[:, 1:], segment_ids[:, -1:]], dim=1)
    leaving_ids, leaving_places = (x[:, : count * chunk].unflatten(1, (count, chunk)) for x in (all_ids, all_places))
    # Of a stream's last step, whose chunk need not be whole, nothing else leaves.
    stored = (leaving_ids == next_ids[..., None]) & (leaving_places >= sinks) & (ids != PADDING)
    return SlotPlan(
        window,
        chunk,
        mask,
        rope.rotation(positions, dtype),
        None if before is None else rope.rotation(old_positions, dtype),
        sink_index,
        sink_rotation,
        rope.rotation((first_places - window)[..., None], dtype),
        rope.back(reach, device, dtype),
        old_ids[:, -1] == segment_ids[:, 0],
        next_ids == first_ids,
        stored,
        torch.tensor(shuffle(slots + chunk), device=device),
    )


def slots_by_chunk(
    k: Tensor, v: Tensor, plan: SlotPlan, carry: WindowCarry | None, slots: Slots, backend: Backend = "auto"
) -> SlotsByChunk:
    """The slots as every chunk of a step finds them, and those after the step.

    k, v [batch, tokens, kv_heads, dim], k before RoPE; `slots` are those of the step before.
    """
    earlier_k, earlier_v = (None, None) if carry is None else (carry.k, carry.v)
    leaving_k = blocks(_behind(k.detach(), earlier_k, plan.window), plan.chunk, 0)
    leaving_v = blocks(_behind(v.detach(), earlier_v, plan.window), plan.chunk, 0)
    known = slots.where(plan.begins_known)
    return store_slots(known, leaving_k, leaving_v, plan.stored, plan.goes_on, plan.order, backend=backend)


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SlotPlan,
    carry: WindowCarry | None,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    ages: Tensor,
    shift: Tensor,
    scale: float,
) -> Tensor:
    """The output of attention, like q. Differentiable in all but counts and ages; the carry is a constant.

    Args:
        q: [batch, tokens, heads, dim], before RoPE.
        k, v: [batch, tokens, kv_heads, dim], k before RoPE.
        plan: from `plan_slots`.
        carry: of the window, from the step before; None where the plan was made without one.
        keys, values, counts, ages: of the slots that each chunk finds, [batch, chunks, kv_heads, slots, dim], the last
            two without dim.
        shift: [batch, tokens, heads], added to the logits of all slots.
        scale: of the logits.
    """
    batch, tokens, heads, dim = q.shape
    earlier_k = earlier_v = None
    if carry is not None:
        assert plan.carry_rotation is not None
        earlier_k, earlier_v = rotate(carry.k.to(k.dtype), plan.carry_rotation), carry.v
    by_chunk = "batch chunks keys heads dim -> (batch chunks) heads keys dim"
    # In a key's extra dimensions, over the scale: the logarithm of its tokens in two parts, for bfloat16; and what
    # takes the query's shift.
    marked = torch.cat([rotate(q, plan.rotation), q.new_ones(*q.shape[:3], 2), shift[..., None].to(q.dtype)], dim=-1)
    queries = rearrange(blocks(F.pad(marked, (0, EXTRA - 3)), plan.chunk, 0), by_chunk)
    band_k, band_v = (
        _bands(F.pad(x, (0, EXTRA)), None if before is None else F.pad(before, (0, EXTRA)), plan)
        for x, before in ((rotate(k, plan.rotation), earlier_k), (v, earlier_v))
    )
    parts = [(band_k, band_v)]
    if plan.sinks is not None:
        assert plan.sink_rotation is not None
        sink_k = plan.sinks.gather(k, None if carry is None else carry.sink_k)
        sink_v = plan.sinks.gather(v, None if carry is None else carry.sink_v)
        sink_k = turn(sink_k, *plan.sink_rotation)
        sink_k, sink_v = (F.pad(rearrange(x, by_chunk), (0, EXTRA)) for x in (sink_k, sink_v))
        parts.append((sink_k, sink_v))
    bias = torch.where(counts > 0, counts.clamp_min(1).log() / scale, EMPTY)
    coarse = bias.to(k.dtype)
    marks = torch.stack([coarse, (bias - coarse).to(k.dtype), torch.full_like(coarse, 1 / scale)], dim=-1)
    turned = turn(keys.to(k.dtype), *slot_rotation(plan.slot_rotation, plan.back, ages)).flatten(0, 1)
    slot_k = torch.cat([turned, F.pad(marks.flatten(0, 1), (0, EXTRA - 3))], dim=-1)
    parts.append((slot_k, F.pad(values.flatten(0, 1).to(v.dtype), (0, EXTRA))))
    all_k, all_v = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    # A key-value head's queries as those of one head: its keys need no copies, and products are larger.
    kv_heads, group = k.shape[2], heads // k.shape[2]
    queries = queries.unflatten(1, (kv_heads, group)).flatten(2, 3)
    out = F.scaled_dot_product_attention(queries, all_k, all_v, attn_mask=plan.grouped(group), scale=scale)
    by_token = "(batch chunks) kv_heads (group chunk) dim -> batch (chunks chunk) (kv_heads group) dim"
    return rearrange(out[..., :dim], by_token, batch=batch, group=group)[:, :tokens]


def slot_rotation(place: Rotation, back: Rotation, ages: Tensor) -> Rotation:
    """How keys of slots turn: `place` [..., 1, 1, dim / 2] turned back by their ages [..., kv_heads, slots], `back` is
    of `Rope.back`."""
    index = ages.long().clamp_max(back.cos.shape[0] - 1)
    return one_after_another(place, Rotation(back.cos[index], back.sin[index]))


def _behind(x: Tensor, before: Tensor | None, window: int) -> Tensor:
    """x [batch, tokens, heads, dim] `window` places later, zeros where nothing came before."""
    if before is None:
        before = x.new_zeros(x.shape[0], window, *x.shape[2:])
    return torch.cat([before.to(x.dtype), x], dim=1)[:, : x.shape[1]]


def _bands(x: Tensor, before: Tensor | None, plan: SlotPlan) -> Tensor:
    """x [batch, tokens, heads, dim] as overlapping bands [batch * chunks, heads, window + chunk, dim]."""
    batch, tokens, heads, dim = x.shape
    if before is None:
        before = x.new_zeros(batch, plan.window, heads, dim)
    x = torch.cat([before.to(x.dtype), x, x.new_zeros(batch, -tokens % plan.chunk, heads, dim)], dim=1)
    bands = x.unfold(1, plan.window + plan.chunk, plan.chunk)
    return rearrange(bands, "batch chunks heads dim keys -> (batch chunks) heads keys dim")
