"""A token per row through a memory that is context of attention: the attachment `mac`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from pipeline.ops.key_cache import TokenPlan
from pipeline.systems.miras.context_memory import ContextBranch, ContextTokens
from pipeline.systems.miras.decoding.state import MemoryState
from pipeline.systems.miras.decoding.steps import MemorySteps, RulePass, as_ring, in_order
from pipeline.systems.miras.memory import MemoryCarry
from pipeline.systems.miras.rules import State
from pipeline.systems.miras.segments import rows_at
from pipeline.systems.miras.step_state import StepState

MEMORY, MOMENTUM = "segment_memory", "segment_momentum"
"""(M, S) as they were before the segment."""
TAIL = "tail"
"""A ring of the last tokens as the parallel pass carries them, [rows, reach, heads, 4 dim + 2]: queries and what was
written, before the convolution, and logits; the token of position p at p % reach."""
KEYS, VALUES = "context_k", "context_v"
"""[rows, heads, persistent + segment, attention dim]: the persistent pairs, and of the segment's tokens what they read.
"""


class ContextSteps(MemorySteps):
    """The context memory of one layer.

    Attention reads the memory as it was before the segment, so that state stays beside the one that the segment's
    tokens write. A parallel pass does the last segment again from its start, and may go on anywhere.
    """

    grain = 1

    def __init__(self, branch: ContextBranch) -> None:
        core = branch.core
        super().__init__(core.config, core.rule, core.eta_logits)
        self.core = core
        self.inputs = branch.inputs
        self.reach = self.config.context + self.config.conv - 2

    def empty(self, rows: int, like: Tensor) -> MemoryState:
        config, running = self.config, self.begin(rows, like)
        tail = running.memory.new_zeros(rows, self.reach, config.heads, 4 * config.head_dim + 2)
        kept = {MEMORY: running.memory.clone(), MOMENTUM: running.momentum.clone(), TAIL: tail}
        return MemoryState(running, kept | self._pairs(rows, like))

    def step(
        self,
        tokens: ContextTokens,
        q: Tensor,
        v: Tensor,
        attended: Tensor,
        plan: TokenPlan,
        lengths: Tensor,
        state: MemoryState,
        scale: float,
    ) -> Tensor:
        """Another output of attention, like `attended` [rows, 1, heads, dim], of attention's queries q before RoPE and
        values v [rows, 1, key-value heads, dim]; lengths [rows] int64 on the CPU, before the token."""
        core, kept = self.core, state.kept
        slot = plan.positions % self.reach
        before = plan.positions[:, None] + torch.arange(1 - self.config.conv, 0, device=slot.device)
        history = rows_at(kept[TAIL], before % self.reach)
        queries, written = self._split(history, q.dtype)
        queries = torch.cat([queries, tokens.queries], dim=1)
        ids = torch.zeros(1, queries.shape[1], dtype=torch.int64, device=q.device)

        keys, values = self._read(queries, ids, state)
        place = self.config.persistent + plan.positions % self.config.context
        kept[KEYS][plan.rows, :, place] = keys[:, 0]
        kept[VALUES][plan.rows, :, place] = values[:, 0]
        context = self._attend(q, lengths % self.config.context, state, scale)
        mixed = core.mixed(attended, context, tokens.logits[..., 2])

        value = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        written = torch.cat([written, core.written(mixed, value, self.heads)], dim=1)
        alpha, beta, _ = tokens.logits.unbind(-1)
        answer = self.write(*core.rule_inputs(written, ids, self.heads), alpha, beta, state.rule_state)
        fresh = [queries[:, -1], written[:, -1], tokens.logits[:, 0, :, :2]]
        kept[TAIL][plan.rows, slot] = torch.cat([x.to(kept[TAIL].dtype) for x in fresh], dim=-1)
        self._end_segments((lengths + 1) % self.config.context == 0, state)
        return core.gated(mixed, answer, self.heads)

    def carry(self, state: MemoryState, length: int) -> MemoryCarry:
        return MemoryCarry(state.kept[MEMORY], state.kept[MOMENTUM], *in_order(state.kept[TAIL], length))

    def taken_over(self, carry: MemoryCarry, length: int, within: RulePass | None) -> MemoryState:
        dtype = self.core.context_kv.dtype
        kept = {MEMORY: carry.memory.clone(), MOMENTUM: carry.momentum.clone(), TAIL: as_ring(carry.tail, length)}
        kept |= self._pairs(carry.memory.shape[0], self.core.context_kv)
        state = MemoryState(self.rule.begin((carry.memory, carry.momentum)), kept)
        count = length % self.config.context
        if count == 0:
            return state
        # What the segment has gathered so far.
        tail = carry.tail[:, 1 - self.config.conv - count :]
        ids = torch.zeros(1, tail.shape[1], dtype=torch.int64, device=tail.device)
        queries, written = self._split(tail, dtype)
        places = slice(self.config.persistent, self.config.persistent + count)
        for name, pairs in zip((KEYS, VALUES), self._read(queries, ids, state), strict=True):
            kept[name][:, :, places] = rearrange(pairs, "rows tokens heads dim -> rows heads tokens dim")
        alpha, beta = tail[:, -count:, :, -2:].unbind(-1)
        tokens = (*self.core.rule_inputs(written, ids, self.heads), alpha, beta)
        return MemoryState(self._after(tokens, (carry.memory, carry.momentum)), kept)

    def _after(self, tokens: tuple[Tensor, ...], state: State) -> StepState:
        """The rule's state after tokens q, k, v, alpha and beta logits [rows, tokens, heads, ...] of a segment."""
        count = tokens[0].shape[1]
        whole = count - count % (self.config.chunk_start or 1)
        within = None
        for part in (slice(0, whole), slice(whole, count)):
            if part.start == part.stop:
                continue
            q, k, v, alpha, beta = (x[:, part] for x in tokens)
            _, after, gates = self.module(q, k, v, alpha, beta, self.eta_logits, state, None, self.heads)
            within = RulePass(state, after, gates) if part.start == whole else None
            state = after
        return self.running(state, within)

    def _pairs(self, rows: int, like: Tensor) -> dict[str, Tensor]:
        """Keys and values with the persistent pairs alone."""
        persistent, context = self.config.persistent, self.config.context
        found = {}
        for name, pairs in ((KEYS, self.core.persistent_k), (VALUES, self.core.persistent_v)):
            found[name] = like.new_zeros(rows, self.config.heads, persistent + context, pairs.shape[-1])
            found[name][:, :, :persistent] = repeat(pairs, "heads pairs dim -> rows heads pairs dim", rows=rows)
        return found

    def _split(self, tail: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries and what was written, of tokens in the form of the tail."""
        dim = self.config.head_dim
        return tail[..., :dim].to(dtype), tail[..., dim : 4 * dim].to(dtype)

    def _read(self, queries: Tensor, ids: Tensor, state: MemoryState) -> tuple[Tensor, Tensor]:
        """Keys and values of the context [rows, tokens, heads, attention dim], of queries [rows, conv - 1 + tokens,
        heads, dim] before the convolution."""
        found = (state.kept[MEMORY], state.kept[MOMENTUM])
        read = self.module.read(self.core.unit_queries(queries, ids, self.heads), found, self.heads)
        return self.core.pairs(read, queries.dtype, self.heads)

    def _attend(self, q: Tensor, places: Tensor, state: MemoryState, scale: float) -> Tensor:
        """Attention of q [rows, 1, heads, dim] at places [rows] of their segments to the persistent pairs and to what
        the segment's tokens have read."""
        seen = self.config.persistent + int(places.max()) + 1
        mask = None
        if int(places.min()) < int(places.max()):
            have = torch.arange(seen) <= self.config.persistent + places[:, None]
            mask = torch.zeros(have.shape).masked_fill_(~have, -math.inf)[:, None, None].to(q)
        keys, values = (state.kept[name][:, :, :seen] for name in (KEYS, VALUES))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)

    def _end_segments(self, ended: Tensor, state: MemoryState) -> None:
        """Where `ended` [rows] bool on the CPU, the memory that the next segment finds is the present one."""
        if not bool(ended.any()):
            return
        self.rule.close(state.rule_state, ended)
        rows = ended.nonzero().squeeze(1).to(state.rule_state.memory.device)
        for name, now in ((MEMORY, state.rule_state.memory), (MOMENTUM, state.rule_state.momentum)):
            state.kept[name].index_copy_(0, rows, now.index_select(0, rows))
