"""A token per row through slots behind attention's window: the attachment `slots`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.attention_slots import turn_slots
from pipeline.ops.key_cache import KeyCache, TokenPlan
from pipeline.ops.rope import Rope, Rotation, turn
from pipeline.ops.slots import Slots, shuffle
from pipeline.ops.store_slots import store_slots
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.decoding.state import MemoryState
from pipeline.systems.miras.decoding.steps import LayerSteps, RulePass
from pipeline.systems.miras.inside import LayerCarry
from pipeline.systems.miras.slots import SlotBranch

PENDING_K, PENDING_V = "pending_k", "pending_v"
"""[rows, chunk, key-value heads, dim]: what the chunk's tokens have pushed out of the window, keys before RoPE."""
SLOTS = "slots."
READ_K, READ_V = "read_k", "read_v"
"""[rows, key-value heads, slots, dim]: the slots as a chunk's queries see them, keys after RoPE."""


@dataclass(frozen=True, eq=False)
class SlotTokenPlan:
    """What the rows' next tokens see, and how its keys turn; shared by all layers."""

    offset: Tensor
    """[rows] int64: the token's place in its chunk."""
    ended: Tensor
    """[rows] bool on the CPU: the token is its chunk's last."""
    begins: bool
    """A row's token is its chunk's first, whose slots and their place are new."""
    stored: Tensor
    """[rows, chunk] bool: of the pending tokens, those that are stored then."""
    order: Tensor
    """[slots + chunk] int64: `pipeline.ops.slots.shuffle`, on the device."""
    mask: Tensor
    """[rows, 1, 1, ring + chunk + sinks] additive: 0 where a row sees a key, else -inf."""
    pending: Rotation
    """[rows, 1, chunk, dim / 2]."""
    sinks: Rotation
    """[rows, 1, sinks, dim / 2]."""
    slots: Rotation
    """[rows, 1, 1, dim / 2]: as `pipeline.ops.attention_slots.SlotPlan` has it."""
    back: Rotation
    """[reach + 1, dim / 2]."""


class SlotSteps(LayerSteps):
    """The slots of one layer."""

    def __init__(self, branch: SlotBranch, window: int, sinks: int) -> None:
        super().__init__(branch.config)
        self.branch, self.window, self.sinks = branch, window, sinks
        self._constants: tuple[Tensor, Rotation] | None = None

    @property
    def grain(self) -> int:
        return self.config.slots.chunk

    def empty(self, rows: int, like: Tensor) -> MemoryState:
        kv_heads, dim, _ = self.branch.key_map.shape
        slots = Slots.empty(rows, kv_heads, self.config.slots.count, dim, like)
        pending = like.new_zeros(rows, self.grain, kv_heads, dim)
        return MemoryState(None, {PENDING_K: pending, PENDING_V: pending.clone()} | _kept(slots))

    def plan(self, plan: TokenPlan, lengths: Tensor, rope: Rope, dtype: torch.dtype) -> SlotTokenPlan:
        """Of a token per row; lengths [rows] int64 on the CPU, before it."""
        positions, chunk, device = plan.positions, self.grain, plan.positions.device
        offset = positions % chunk
        first = (positions - offset)[:, None]
        order, sinks = torch.arange(chunk, device=device), torch.arange(self.sinks, device=device)
        leaving = first - self.window + order
        seen = torch.cat(
            [
                torch.arange(plan.slots, device=device) <= positions[:, None],
                (order <= offset[:, None]) & (leaving >= 0),
                first - sinks > self.window,
            ],
            dim=1,
        )
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)

        shuffled, back = self._same_for_all(rope, device, dtype)

        def rotation(places: Tensor) -> Rotation:
            return Rotation(*(x.transpose(1, 2) for x in rope.rotation(places.clamp_min(0), dtype)))

        return SlotTokenPlan(
            offset,
            lengths % chunk == chunk - 1,
            bool((lengths % chunk == 0).any()),
            leaving >= self.sinks,
            shuffled,
            mask[:, None, None],
            rotation(leaving),
            rotation((first - self.window - self.sinks).clamp_min(0) + sinks),
            rope.rotation(first - self.window, dtype),
            back,
        )

    def _same_for_all(self, rope: Rope, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Rotation]:
        """The shuffle of the slots and their turns back, made once and not at every token."""
        if self._constants is None:
            settings = self.config.slots
            order = torch.tensor(shuffle(settings.count + settings.chunk), device=device)
            self._constants = order, rope.back(settings.reach, device, dtype)
        return self._constants

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shift: Tensor,
        cache: KeyCache,
        token: TokenPlan,
        plan: SlotTokenPlan,
        state: MemoryState,
        scale: float,
    ) -> Tensor:
        """Takes in k and v [rows, key-value heads, 1, dim], then the attention of q [rows, heads, 1, dim], like q; q
        and k come before RoPE. shift [rows, 1, heads, 1] is the branch's, of the layer's input."""
        branch, kept = self.branch, state.kept
        for name, leaving in zip((PENDING_K, PENDING_V), cache.leaving(token), strict=True):
            kept[name][token.rows, plan.offset] = leaving[:, 0]
        cache.take(k, v, token)
        slots, made, maps = _slots(kept), state.made, branch.maps(Topology())
        if plan.begins or not made:
            keys, values = maps.read(slots.keys.to(k.dtype), slots.values.to(v.dtype))
            made[READ_K], made[READ_V] = turn_slots(keys, plan.slots, plan.back, slots.ages), values
        ring = slice(cache.sinks, cache.sinks + token.slots)
        all_k = torch.cat(
            [
                cache.rotated[:, :, ring],
                turn(kept[PENDING_K].transpose(1, 2), *plan.pending),
                turn(cache.keys[:, :, : cache.sinks], *plan.sinks),
                made[READ_K],
            ],
            dim=2,
        )
        all_v = torch.cat(
            [
                cache.values[:, :, ring],
                kept[PENDING_V].transpose(1, 2),
                cache.values[:, :, : cache.sinks],
                made[READ_V],
            ],
            dim=2,
        )
        grouped = turn(q, *token.rotation).reshape(*k.shape[:2], -1, k.shape[-1])
        # [rows, key-value heads, group, 1]
        shift = maps.shifted(shift.squeeze(-1), q.transpose(1, 2)).transpose(1, 2).reshape(*grouped.shape[:3], 1)
        bias = slots.counts.log()[:, :, None] + shift
        mask = torch.cat([plan.mask.expand(*grouped.shape[:3], -1).to(bias.dtype), bias], dim=-1)
        out = F.scaled_dot_product_attention(grouped, all_k, all_v, attn_mask=mask.to(q.dtype), scale=scale)
        if bool(plan.ended.any()):
            self._store(slots, plan, kept)
        return out.reshape(q.shape)

    def _store(self, slots: Slots, plan: SlotTokenPlan, kept: dict[str, Tensor]) -> None:
        """What is pending goes into the slots of rows whose chunk has ended."""
        k, v, stored = kept[PENDING_K][:, None], kept[PENDING_V][:, None], plan.stored[:, None]
        goes_on = torch.ones_like(stored[..., 0])
        importance = self.branch.importance(Topology())
        weights = None if importance is None else importance.weights(k, v)
        after = store_slots(slots, k, v, weights, stored, goes_on, plan.order, backend=self.branch.backend).after
        rows = plan.ended.nonzero().squeeze(1).to(plan.offset.device)
        for name, x in _kept(after).items():
            kept[name].index_copy_(0, rows, x.index_select(0, rows))

    def carry(self, state: MemoryState, length: int) -> Slots:
        assert length % self.grain == 0, "a parallel pass begins where a chunk does"
        return _slots(state.kept)

    def loaded(self, left: LayerCarry, length: int, within: RulePass | None, before: LayerCarry | None) -> MemoryState:
        count = length % self.grain
        # A chunk that has not ended has stored nothing: the slots are those that it found.
        found = left if count == 0 else before
        slots = None if found is None else found.memory
        kept = self.empty(1, self.branch.key_map).kept
        assert left.attention is not None
        kept = {name: x.expand(left.attention.k.shape[0], *x.shape[1:]).clone() for name, x in kept.items()}
        if slots is not None:
            assert isinstance(slots, Slots)
            kept |= {name: x.clone() for name, x in _kept(slots).items()}
        if count and before is not None and before.attention is not None:
            kept[PENDING_K][:, :count] = before.attention.k[:, :count]
            kept[PENDING_V][:, :count] = before.attention.v[:, :count]
        return MemoryState(None, kept)


def _kept(slots: Slots) -> dict[str, Tensor]:
    return {SLOTS + name: x for name, x in slots._asdict().items()}


def _slots(kept: dict[str, Tensor]) -> Slots:
    # Of a state from before slots had weights, when every token weighed 1.
    counts = kept[SLOTS + "counts"]
    return Slots(**{name: kept.get(SLOTS + name, counts) for name in Slots._fields})
