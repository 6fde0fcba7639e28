"""Keys and values that attention keeps between tokens when text is decoded: a ring of the window and the sinks, or all.

One token per row; it sees what `window_attention` and `full_attention` see (`attention.py`). Sinks are placed right
before the window by turning their keys at every step, so that one softmax over one buffer is enough:

    plan = plan_token(lengths, rope=rope, window=window, sinks=sinks, like=hidden)
    for cache in caches:
        out = cache.attend(q, k, v, plan, scale)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.attention_sinks import NO_TOKEN, WindowCarry
from pipeline.ops.rope import Rope, Rotation, turn

SMALLEST = 16
"""Tokens that a cache has room for at the least; it grows by doubling."""


@dataclass(frozen=True, eq=False)
class TokenPlan:
    """Where the rows' next tokens stand and what they see; shared by all layers."""

    positions: Tensor
    """[rows] int64, on the device."""
    rows: Tensor
    """[rows] int64: 0, 1, ..."""
    slots: int
    """Tokens that the ring must have room for."""
    place: Tensor
    """[rows] int64: where the token goes, behind the sinks."""
    rotation: Rotation
    """Of the positions, [rows, 1, 1, dim / 2]."""
    new_sinks: tuple[Tensor, Tensor] | None
    """Rows whose token is a sink, and which one; None where there are none."""
    sink_rotation: Rotation | None
    """Of the sinks' positions, placed right before the window, [rows, 1, sinks, dim / 2]; None where no row is beyond
    its window."""
    seen: slice
    """Part of the buffer."""
    mask: Tensor | None
    """[rows, 1, 1, seen], 0 where a row has a key, else -inf; None where all have all."""


def plan_token(lengths: Tensor, *, rope: Rope, window: int | None, sinks: int, like: Tensor) -> TokenPlan:
    """The plan of one token per row.

    Args:
        lengths: [rows] int64 on the CPU, tokens of each row so far: the position of the next.
        rope: the model's rotary embedding.
        window: keys that a query sees, itself included; None: all.
        sinks: first tokens that are seen from beyond the window too; 0 for full attention.
        like: a tensor of attention's dtype and device.
    """
    device, first, last = like.device, int(lengths.min()), int(lengths.max())
    positions = lengths.to(device)
    limit = last + 1 if window is None else min(window, last + 1)
    place = sinks + (positions if window is None else positions % window)
    # Below the first sink that has left the window, none is seen.
    outside = window if window is not None and sinks > 0 and last >= window else None
    seen = slice(sinks if outside is None else 0, sinks + limit)
    mask = None
    if first + 1 < limit or (outside is not None and first < outside + sinks - 1):
        # A ring is filled from its start; sink j has left the window of a token j + window or more places on.
        order = torch.arange(limit, device=device)
        have = order <= positions[:, None]
        if outside is not None:
            left = torch.arange(outside, outside + sinks, device=device) <= positions[:, None]
            have = torch.cat([left, have], dim=1)
        mask = torch.zeros(have.shape, dtype=like.dtype, device=device).masked_fill_(~have, -math.inf)[:, None, None]
    new_sinks = None
    if first < sinks:
        rows = (lengths < sinks).nonzero().squeeze(1)
        new_sinks = (rows.to(device), lengths[rows].to(device))
    sink_rotation = None
    if outside is not None:
        # The query turns by its own position: what the sinks are nearer by is added to theirs.
        nearer = (positions - (outside + sinks - 1)).clamp(min=0)
        rotation = rope.rotation(nearer[:, None] + torch.arange(sinks, device=device), like.dtype)
        sink_rotation = Rotation(*(x.transpose(1, 2) for x in rotation))
    return TokenPlan(
        positions,
        torch.arange(len(lengths), device=device),
        limit,
        place,
        rope.rotation(positions[:, None], like.dtype),
        new_sinks,
        sink_rotation,
        seen,
        mask,
    )


@dataclass
class KeyCache:
    """One layer's keys and values of all rows, [rows, key-value heads, sinks + slots, dim] each: the first tokens, then
    the token of position p at p % window (p, without a window)."""

    keys: Tensor
    """Before RoPE."""
    values: Tensor
    rotated: Tensor
    """Keys after RoPE."""
    window: int | None
    sinks: int

    @classmethod
    def empty(cls, rows: int, heads: int, dim: int, *, window: int | None, sinks: int, like: Tensor) -> KeyCache:
        """Without a token; `heads` are key-value heads."""
        shape = (rows, heads, sinks + (SMALLEST if window is None else min(window, SMALLEST)), dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape), like.new_zeros(shape), window, sinks)

    @property
    def slots(self) -> int:
        return self.keys.shape[2] - self.sinks

    def leaving(self, plan: TokenPlan) -> tuple[Tensor, Tensor]:
        """Key, before RoPE, and value [rows, 1, key-value heads, dim] of the token that the next one takes the place
        of; of no meaning in rows that are not beyond their window."""
        self._reserve(plan.slots)
        return self.keys[plan.rows, :, plan.place][:, None], self.values[plan.rows, :, plan.place][:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: TokenPlan, scale: float) -> Tensor:
        """Takes in k and v [rows, key-value heads, 1, dim], then the attention of q [rows, heads, 1, dim], like q; q
        and k come before RoPE."""
        self.take(k, v, plan)
        if plan.sink_rotation is not None:
            self.rotated[:, :, : self.sinks] = turn(self.keys[:, :, : self.sinks], *plan.sink_rotation)
        # The heads of a group are queries of one call: repeated keys would be copies of the window.
        grouped = turn(q, *plan.rotation).reshape(*k.shape[:2], -1, k.shape[-1])
        keys, values = self.rotated[:, :, plan.seen], self.values[:, :, plan.seen]
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=plan.mask, scale=scale)
        return out.reshape(q.shape)

    def take(self, k: Tensor, v: Tensor, plan: TokenPlan) -> None:
        """Takes in k, before RoPE, and v [rows, key-value heads, 1, dim]."""
        self._reserve(plan.slots)
        self.keys[plan.rows, :, plan.place] = k[:, :, 0]
        self.values[plan.rows, :, plan.place] = v[:, :, 0]
        self.rotated[plan.rows, :, plan.place] = turn(k, *plan.rotation)[:, :, 0]
        if plan.new_sinks is not None:
            rows, index = plan.new_sinks
            self.keys[rows, :, index] = k[rows, :, 0]
            self.values[rows, :, index] = v[rows, :, 0]

    def carry(self, length: int, window: int) -> WindowCarry | None:
        """What a parallel pass goes on with, of rows of `length` tokens each; `window` is that of its attention. None
        where there are no tokens."""
        if length == 0:
            return None
        count = min(length, window if self.window is None else self.window)
        positions = torch.arange(length - window, length, device=self.keys.device)
        index = self.sinks + self._slot(positions[window - count :])

        def laid_out(x: Tensor) -> Tensor:
            taken = x.index_select(2, index).transpose(1, 2)
            return F.pad(taken, (0, 0, 0, 0, window - count, 0))

        rows = self.keys.shape[0]
        present = positions >= length - count
        return WindowCarry(
            laid_out(self.keys),
            laid_out(self.values),
            torch.where(present, 0, NO_TOKEN).expand(rows, -1),
            torch.where(present, positions, 0).expand(rows, -1),
            self.keys[:, :, : self.sinks].transpose(1, 2),
            self.values[:, :, : self.sinks].transpose(1, 2),
        )

    def load(self, carry: WindowCarry, length: int, rope: Rope) -> None:
        """Takes over what a parallel pass left of rows of `length` tokens each."""
        count = min(length, carry.k.shape[1])
        self._reserve(count)
        positions = torch.arange(length - count, length, device=self.keys.device)
        index = self.sinks + self._slot(positions)
        for mine, tokens, sinks in ((self.keys, carry.k, carry.sink_k), (self.values, carry.v, carry.sink_v)):
            mine.index_copy_(2, index, tokens[:, -count:].transpose(1, 2).to(mine.dtype))
            mine[:, :, : self.sinks] = sinks.transpose(1, 2)
        rotation = rope.rotation(positions, self.keys.dtype)
        self.rotated.index_copy_(2, index, turn(carry.k[:, -count:], *rotation).transpose(1, 2).to(self.keys.dtype))

    def tensors(self, lengths: Tensor) -> dict[str, Tensor]:
        """Keys and values as far as a row of `lengths` [rows] has them; `restored` is the inverse."""
        filled = self.sinks + min(self.slots, int(lengths.max()) if len(lengths) else 0)
        parts = {"keys": self.keys, "values": self.values}
        return {name: x[:, :, :filled].contiguous() for name, x in parts.items()}

    def restored(self, tensors: Mapping[str, Tensor], lengths: Tensor, rope: Rope) -> KeyCache:
        """A cache like this one with what `tensors` gave of rows of these lengths. Raises ValueError for another shape:
        it names the tensor."""
        longest = int(lengths.max()) if len(lengths) else 0
        filled = self.sinks + (longest if self.window is None else min(self.window, longest))
        shape = (len(lengths), self.keys.shape[1], filled, self.keys.shape[3])
        for name, tensor in tensors.items():
            if tensor.shape != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")
        keys, values = (tensors[name].to(self.keys) for name in ("keys", "values"))
        slots = torch.arange(filled - self.sinks, device=keys.device)
        last = lengths.to(keys.device)[:, None] - 1
        # The newest token that goes to a slot.
        newest = slots if self.window is None else last - (last - slots) % self.window
        positions = torch.where(last < slots, slots, newest)
        rotation = rope.rotation(positions, keys.dtype)
        rotated = torch.zeros_like(keys)
        rotated[:, :, self.sinks :] = turn(keys[:, :, self.sinks :], *(x.transpose(1, 2) for x in rotation))
        found = KeyCache(keys.clone(), values.clone(), rotated, self.window, self.sinks)
        found._reserve(SMALLEST if self.window is None else min(SMALLEST, self.window))
        return found

    def select(self, rows: Tensor) -> KeyCache:
        """Copies of rows by index [rows] int64 on the device."""
        keys, values, rotated = (x.index_select(0, rows) for x in self._buffers())
        return KeyCache(keys, values, rotated, self.window, self.sinks)

    @staticmethod
    def join(caches: Sequence[KeyCache]) -> KeyCache:
        """One cache of all their rows."""
        first, length = caches[0], max(cache.keys.shape[2] for cache in caches)
        grown = [[_longer(x, length) for x in cache._buffers()] for cache in caches]
        keys, values, rotated = (torch.cat(parts) for parts in zip(*grown, strict=True))
        return KeyCache(keys, values, rotated, first.window, first.sinks)

    def _slot(self, positions: Tensor) -> Tensor:
        return positions if self.window is None else positions % self.window

    def _buffers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.rotated

    def _reserve(self, slots: int) -> None:
        if slots <= self.slots:
            return
        wanted = max(slots, 2 * self.slots)
        length = self.sinks + (wanted if self.window is None else min(wanted, self.window))
        self.keys, self.values, self.rotated = (_longer(x, length) for x in self._buffers())


def _longer(x: Tensor, length: int) -> Tensor:
    """x [rows, heads, tokens, dim] with zeros behind it, [rows, heads, length, dim]."""
    missing = length - x.shape[2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x
