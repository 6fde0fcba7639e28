"""Attention sinks for windowed attention: what a stream carries, and which sinks a block of queries can see.

A pretrained transformer that loses its first tokens collapses (StreamingLLM, arXiv 2309.17453), so a query beyond the
window still sees the first `sinks` tokens of its document. Their distance is *rebased*: as in StreamingLLM they stand
right before the window, so no logit has a distance that the model was not trained with. That needs another rotation of
the query than the window's keys do, which is why sinks are a separate, small set of logits under one joint softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.rope import Rope, Rotation, turn

NO_TOKEN = -1
PADDING = -2


class WindowCarry(NamedTuple):
    """What a stream carries from one step to the next at one layer: everything before RoPE, so it can be rebased.

    `segment_ids` and `positions` are the same at every layer.
    """

    k: Tensor
    """[batch, window, kv_heads, dim]: the last tokens, right-aligned."""
    v: Tensor
    """[batch, window, kv_heads, dim]."""
    segment_ids: Tensor
    """[batch, window] int64: the document's ordinal in its stream, -1 where there is no token."""
    positions: Tensor
    """[batch, window] int64: positions within the document."""
    sink_k: Tensor
    """[batch, sinks, kv_heads, dim]: the first tokens of the document that the last token belongs to; zeros for those
    that have not come yet."""
    sink_v: Tensor
    """[batch, sinks, kv_heads, dim]."""


def empty_carry(
    batch: int, window: int, sinks: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device | str
) -> WindowCarry:
    """The carry of `batch` streams that have seen nothing; `heads` are key-value heads."""
    k = torch.zeros(batch, window, heads, dim, dtype=dtype, device=device)
    sink = torch.zeros(batch, sinks, heads, dim, dtype=dtype, device=device)
    ids = torch.full((batch, window), NO_TOKEN, dtype=torch.int64, device=device)
    return WindowCarry(k, torch.zeros_like(k), ids, torch.zeros_like(ids), sink, torch.zeros_like(sink))


@dataclass(frozen=True, eq=False)
class SinkIndex:
    """Where sinks lie: in the step's own tokens, or in the carry when their document began in an earlier step."""

    index: Tensor
    """[batch, sets, sinks] int64 into the step's tokens (clamped)."""
    carried: Tensor
    """[batch, sets, sinks] bool: it lies in the carry instead."""
    present: Tensor
    """[batch, sets, sinks] bool: it exists."""

    @classmethod
    def of(
        cls, tokens: Tensor, segment_ids: Tensor, positions: Tensor, carry_ids: Tensor | None, sinks: int
    ) -> SinkIndex:
        """The sinks of the documents that the tokens at indices `tokens` [sets] belong to."""
        start = tokens - positions[:, tokens]
        index = start[..., None] + torch.arange(sinks, device=tokens.device)
        carried = index < 0
        present = index < positions.shape[1]
        if carry_ids is None:
            # A stream that starts in the middle of a document has no sinks for it.
            present = present & ~carried
        else:
            # A negative index lies before this step, and then the carry's last token is of that same document.
            present = present & (~carried | (carry_ids[:, -1:] == segment_ids[:, tokens])[..., None])
        return cls(index.clamp(0, positions.shape[1] - 1), carried, present)

    def gather(self, x: Tensor, carried: Tensor | None) -> Tensor:
        """The sinks' rows of x [batch, tokens, heads, dim] or carried [batch, sinks, heads, dim].

        Returns [batch, sets, sinks, heads, dim]; where a sink is not `present`, an arbitrary row stands.
        """
        rows = x[torch.arange(x.shape[0], device=x.device)[:, None, None], self.index]
        if carried is None:
            return rows
        return torch.where(self.carried[..., None, None], carried[:, None].to(x.dtype), rows)


@dataclass(frozen=True, eq=False)
class SinkPlan:
    """Which sinks every block of `block` queries sees. One set per block is enough:

    let a block start at token t and hold at most `window` queries. A query at index i < t + window that sees a sink is
    at document position p >= window, so its document began at i - p < t and, being contiguous up to i, contains t.
    Every such query of the block is therefore in the document of token t.
    """

    block: int
    sinks: SinkIndex
    visible: Tensor
    """[batch, blocks, block, sinks] bool."""
    query_rotation: Rotation
    """Of the effective query positions min(p, window + sinks - 1), [batch, tokens, 1, dim / 2]."""
    key_rotation: Rotation
    """Of positions 0 .. sinks - 1, [sinks, 1, dim / 2]."""

    @classmethod
    def build(
        cls,
        segment_ids: Tensor,
        positions: Tensor,
        carry_ids: Tensor | None,
        rope: Rope,
        *,
        window: int,
        sinks: int,
        block: int,
        dtype: torch.dtype,
    ) -> SinkPlan:
        device = segment_ids.device
        first = torch.arange(0, segment_ids.shape[1], block, device=device)
        index = SinkIndex.of(first, segment_ids, positions, carry_ids, sinks)
        order = torch.arange(sinks, device=device)
        beyond = blocks(positions, block, 0)[..., None] - order >= window
        return cls(
            block,
            index,
            beyond & index.present[:, :, None],
            rope.rotation(positions.clamp(max=window + sinks - 1), dtype),
            rope.rotation(order, dtype),
        )

    def keys(self, k: Tensor, carried: Tensor | None) -> Tensor:
        """The rotated sink keys of every block, [batch, blocks, sinks, kv_heads, dim]; k comes before RoPE."""
        return turn(self.sinks.gather(k, carried), *self.key_rotation)

    def values(self, v: Tensor, carried: Tensor | None) -> Tensor:
        """The sink values of every block, [batch, blocks, sinks, kv_heads, dim]."""
        return self.sinks.gather(v, carried)


@dataclass(frozen=True, eq=False)
class CarryPlan:
    """How the next step's carry is cut out of this step's tokens and the carry before them."""

    window: int
    segment_ids: Tensor
    positions: Tensor
    sinks: SinkIndex

    @classmethod
    def build(
        cls, segment_ids: Tensor, positions: Tensor, before: tuple[Tensor, Tensor] | None, *, window: int, sinks: int
    ) -> CarryPlan:
        last = torch.full((1,), segment_ids.shape[1] - 1, device=segment_ids.device)
        index = SinkIndex.of(last, segment_ids, positions, before[0] if before else None, sinks)
        carry_ids, carry_positions = before if before else (None, None)
        return cls(
            window,
            latest(segment_ids, carry_ids, window, NO_TOKEN),
            latest(positions, carry_positions, window, 0),
            index,
        )

    @torch.no_grad()
    def cut(self, k: Tensor, v: Tensor, carry: WindowCarry | None) -> WindowCarry:
        """The carry after k and v [batch, tokens, kv_heads, dim], detached and in storage of its own."""
        before = (carry.k, carry.v, carry.sink_k, carry.sink_v) if carry else (None,) * 4
        present = self.sinks.present[:, 0, :, None, None]
        return WindowCarry(
            latest(k, before[0], self.window, 0),
            latest(v, before[1], self.window, 0),
            self.segment_ids,
            self.positions,
            self.sinks.gather(k, before[2])[:, 0] * present,
            self.sinks.gather(v, before[3])[:, 0] * present,
        )


def latest(x: Tensor, before: Tensor | None, length: int, fill: int) -> Tensor:
    """The last `length` entries along dimension 1 of `before` followed by x; `fill` where there is nothing."""
    missing = length - x.shape[1]
    if missing <= 0:
        # A slice would keep the whole step's keys alive until the next step.
        return x[:, -missing:].detach().clone()
    if before is None:
        before = x.new_full((x.shape[0], missing, *x.shape[2:]), fill)
    return torch.cat((before[:, before.shape[1] - missing :].to(x.dtype), x.detach()), dim=1)


def blocks(x: Tensor, block: int, fill: int) -> Tensor:
    """x [batch, tokens, ...] as [batch, blocks, block, ...], the last block filled up with `fill`."""
    batch, tokens, *rest = x.shape
    count = -(-tokens // block)
    if count * block > tokens:
        x = F.pad(x, (0, 0) * len(rest) + (0, count * block - tokens), value=fill)
    return x.reshape(batch, count, block, *rest)
