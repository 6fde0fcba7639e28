"""A memory as context of its layer's attention (the attachment `mac`; Titans, arXiv 2501.00663, section 4.1).

It is written with what attention gave, so it works inside of attention, segment after segment. docs/attachments.md has
the equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.ops.checks import sum_dtype
from pipeline.ops.convolution import causal_convolution
from pipeline.ops.gates import GateLinear
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.attachments import output_gate
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.memory import MemoryCarry, MemoryHealth, memory_health, unit, unit_keys
from pipeline.systems.miras.rules import State, memory_rule
from pipeline.systems.miras.segments import SegmentPlan, rows_at


class ContextTokens(NamedTuple):
    """What the memory of `mac` takes from a layer's input, before the exchange; it is the same after it, with all of
    the sequence and this rank's part of the heads."""

    queries: Tensor
    """[batch, sequence, heads, dim], before the convolution."""
    logits: Tensor
    """[batch, sequence, heads, 3] float32: of forgetting, of the step size, of the context gate."""


class ContextInputs(nn.Module):
    """Queries and gate logits from the layer's input: the part of `mac` that is computed before the exchange."""

    def __init__(self, width: int, config: MemoryConfig, norm_eps: float) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.q_proj = nn.Linear(width, config.heads * config.head_dim, bias=False)
        self.alpha_proj = GateLinear(width, config.heads)
        self.beta_proj = GateLinear(width, config.heads)
        self.context_gate = GateLinear(width, config.heads)

    def forward(self, hidden: Tensor) -> ContextTokens:
        """hidden [batch, sequence / degree, width]."""
        normed = self.norm(hidden)
        precise = normed.to(sum_dtype(hidden))
        logits = [gate(precise) for gate in (self.alpha_proj, self.beta_proj, self.context_gate)]
        queries = self.q_proj(normed)
        queries = rearrange(queries, "batch sequence (heads dim) -> batch sequence heads dim", heads=self.heads)
        return ContextTokens(queries, torch.stack(logits, dim=-1))


class ContextMemory(nn.Module):
    """A memory as context of attention, for this rank's heads: every head of attention has a memory of its own.

    Per segment, with x the layer's tokens and A_x their attention to the window (persistent pairs p, learned):

        h_t = norm(M(q_t)), M as it was before the segment          q_t from x_t
        A_c = softmax attention of token t to [p, h_j of its own document and segment, j <= t]
        y_t = A_x + tanh(c_t) (A_c - A_x)                           c_t from x_t, zero at first
        u_t = [norm(y_t), norm(v_t)]                        v_t the head's own value of token t
        write (k(u_t), v(u_t)) into M, then read r_t = M_t(q'(u_t))
        o_t = y_t * 2 sigmoid(W_o norm(r_t))                        W_o zero at first
    """

    def __init__(self, config: MemoryConfig, attention_dim: int, norm_eps: float, *, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = norm_eps
        self.recompute = recompute
        heads, dim = config.heads, config.head_dim
        self.rule = memory_rule(config)
        self.eta_logits = nn.Parameter(torch.empty(heads)) if config.has_momentum else None
        self.conv = nn.Parameter(torch.empty(heads, config.conv, 4 * dim))
        self.context_norm = nn.Parameter(torch.empty(heads, dim))
        self.context_kv = nn.Parameter(torch.empty(heads, 2 * attention_dim, dim))
        self.persistent_k = nn.Parameter(torch.empty(heads, config.persistent, attention_dim))
        self.persistent_v = nn.Parameter(torch.empty(heads, config.persistent, attention_dim))
        self.write = nn.Parameter(torch.empty(heads, 3 * dim, 2 * attention_dim))
        self.head_norm = nn.Parameter(torch.empty(heads, dim))
        self.out_gate = nn.Parameter(torch.empty(heads, attention_dim, dim))

    def forward(
        self,
        tokens: ContextTokens,
        q: Tensor,
        v: Tensor,
        attended: Tensor,
        segment_ids: Tensor,
        plan: SegmentPlan,
        carry: MemoryCarry | None,
        topology: Topology,
        scale: float,
    ) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
        """tokens, attention's queries q before RoPE, values v and output `attended` [batch, sequence, heads / degree,
        attention dim] (v: key-value heads), segment_ids [batch, sequence] give the output (like attended), the new
        carry and the health."""
        local = topology.heads(self.config.heads)
        dim, taps = self.config.head_dim, self.config.conv
        accumulate_dtype = sum_dtype(attended)
        if carry is None:
            carry = self._empty_carry(tokens, plan.reach)
        old_queries, old_written, old_logits = carry.tail.split([dim, 3 * dim, 2], dim=-1)
        queries = torch.cat([old_queries.to(q.dtype), tokens.queries], dim=1)
        ids = torch.cat([carry.tail_segments, segment_ids], dim=1)
        before = q.new_zeros(*old_written.shape[:3], q.shape[-1])
        v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)

        # What does not wait for the memory, for all segments at once.
        reads = self.unit_queries(queries, ids, local)
        reads = torch.cat([reads.new_zeros(reads.shape[0], taps - 1, *reads.shape[2:]), reads], dim=1)
        logits = torch.cat([F.pad(old_logits, (0, 1)), tokens.logits], dim=1)
        stages = zip(
            *(plan.gather(x).unbind(0) for x in (reads, logits)),
            *(plan.gather(torch.cat([before, x], dim=1)).unbind(0) for x in (q, v, attended)),
            strict=True,
        )
        # The first stage's tokens from the carry, and those that its convolution reaches back to.
        replayed = rows_at(old_written, plan.replay_index)
        history, history_ids = rows_at(old_written, plan.history_index).to(q.dtype), rows_at(ids, plan.history_index)
        state = (carry.memory, carry.momentum)
        outs, writes, gates = [], [], []
        for index, (read, logit, query, value, base) in enumerate(stages):
            args = (read, logit, query, value, base, replayed if index == 0 else None, history, history_ids)
            if self.recompute and torch.is_grad_enabled():
                out, written, state, gate = checkpoint(
                    self._stage, index, plan, *args, state, local, scale, use_reentrant=False, preserve_rng_state=False
                )
            else:
                out, written, state, gate = self._stage(index, plan, *args, state, local, scale)
            history = torch.cat([history, written], dim=1)[:, 1 - taps :]
            history_ids = torch.cat([history_ids, plan.segment_ids[index]], dim=1)[:, 1 - taps :]
            outs.append(out)
            writes.append(written)
            gates.append(gate)

        with torch.no_grad():
            latest = [tokens.queries, plan.scatter(writes, plan.reach), tokens.logits[..., :2]]
            fresh = torch.cat([x[:, -plan.reach :].to(accumulate_dtype) for x in latest], dim=-1)
            tail = torch.cat([carry.tail, fresh], dim=1)[:, -plan.reach :].clone()
            new = MemoryCarry(state[0].detach(), state[1].detach(), tail, ids[:, -plan.reach :].clone())
        health = memory_health(
            self.config, new, tokens.logits[..., 1], *(plan.scatter(x) for x in zip(*gates, strict=True))
        )
        return plan.scatter(outs), new, health

    def _stage(
        self,
        index: int,
        plan: SegmentPlan,
        reads: Tensor,
        logits: Tensor,
        query: Tensor,
        value: Tensor,
        base: Tensor,
        replayed: Tensor | None,
        history: Tensor,
        history_ids: Tensor,
        state: State,
        local: slice,
        scale: float,
    ) -> tuple[Tensor, Tensor, State, tuple[Tensor, Tensor, Tensor]]:
        """One stage of all rows: its output, what it wrote before the convolution, the state after it, its gates."""
        ids = plan.segment_ids[index]
        found = _where(plan.receives_state[index], state)
        read = self.rule.read(reads, found, local)
        if plan.mixed[index]:
            other = self.rule.read(reads, _where(plan.receives_state[index].new_zeros(()), state), local)
            read = read.where(plan.in_first_document[index][..., None, None], other)
        context = self._attend(read, query, ids, local, scale)
        mixed = self.mixed(base, context, logits[..., 2])
        written = self.written(mixed, value, local)
        if replayed is not None:
            written = torch.where(plan.replay_mask[..., None, None], replayed.to(written.dtype), written)
        tokens, token_ids = torch.cat([history, written], dim=1), torch.cat([history_ids, ids], dim=1)
        q, k, v = self.rule_inputs(tokens, token_ids, local)
        answer, after, gates = self.rule(q, k, v, logits[..., 0], logits[..., 1], self.eta_logits, found, ids, local)
        out = self.gated(mixed, answer, local)
        # A segment that goes on in the next step is done again there, from the state that it found here.
        left = _where(plan.complete[index], after, _where(plan.passes_through[index], state))
        return out, written, left, (gates.alpha.detach(), gates.eta.detach(), gates.theta.detach())

    def _attend(self, read: Tensor, query: Tensor, ids: Tensor, local: slice, scale: float) -> Tensor:
        """Attention of query [batch, length, heads, attention dim] to the persistent pairs and to what was read."""
        k, v = self.pairs(read, query.dtype, local)
        batch = ids.shape[0]
        pairs = [
            repeat(x[local], "heads pairs dim -> batch pairs heads dim", batch=batch)
            for x in (self.persistent_k, self.persistent_v)
        ]
        keys, values = (torch.cat([pair.to(x.dtype), x], dim=1) for pair, x in zip(pairs, (k, v), strict=True))
        # Documents apart, and a token sees no later one; itself it always sees.
        seen = (ids[:, :, None] == ids[:, None, :]).tril()
        seen = F.pad(seen, (self.config.persistent, 0), value=True)[:, None]
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=seen, scale=scale
        )
        return out.transpose(1, 2)

    def unit_queries(self, queries: Tensor, ids: Tensor, local: slice) -> Tensor:
        """Queries [batch, taps - 1 + tokens, heads, dim] of documents `ids`, after the convolution and of unit length,
        [batch, tokens, heads, dim]."""
        mixed = causal_convolution(queries, ids, self.conv[local][..., : self.config.head_dim])
        return unit(F.silu(mixed) if self.config.key_activation == "silu" else mixed)

    def pairs(self, read: Tensor, dtype: torch.dtype, local: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of the context, of what was read, [batch, tokens, heads, attention dim] in `dtype`."""
        read = F.rms_norm(read, read.shape[-1:], eps=self.norm_eps) * self.context_norm[local]
        k, v = torch.einsum("bthi,hoi->btho", read.to(dtype), self.context_kv[local]).chunk(2, dim=-1)
        return k, v

    def mixed(self, attended: Tensor, context: Tensor, logits: Tensor) -> Tensor:
        """y of attention to the window and to the context, like either, and the context gate's logits [batch, tokens,
        heads]."""
        return attended + torch.tanh(logits[..., None]).to(attended.dtype) * (context - attended)

    def written(self, mixed: Tensor, value: Tensor, local: slice) -> Tensor:
        """What goes into the convolution and then into the memory, [batch, tokens, heads, 3 dim]."""
        given = torch.cat([F.rms_norm(x, x.shape[-1:], eps=self.norm_eps) for x in (mixed, value)], dim=-1)
        return torch.einsum("bthi,hoi->btho", given, self.write[local])

    def rule_inputs(self, written: Tensor, ids: Tensor, local: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the rule, of `written` [batch, taps - 1 + tokens, heads, 3 dim] of documents
        `ids`."""
        return unit_keys(causal_convolution(written, ids, self.conv[local][..., self.config.head_dim :]), self.config)

    def gated(self, mixed: Tensor, answer: Tensor, local: slice) -> Tensor:
        """The output, of y and what the memory answered."""
        normed = F.rms_norm(answer, answer.shape[-1:], eps=self.norm_eps) * self.head_norm[local]
        return mixed * output_gate(torch.einsum("bthi,hoi->btho", normed.to(mixed.dtype), self.out_gate[local]))

    def _empty_carry(self, tokens: ContextTokens, reach: int) -> MemoryCarry:
        batch, _, heads, dim = tokens.queries.shape
        memory, momentum = self.rule.empty_state(batch, slice(0, heads), tokens.queries)
        tail = tokens.logits.new_zeros(batch, reach, heads, 4 * dim + 2)
        ids = torch.full((batch, reach), -1, dtype=torch.int64, device=tail.device)
        return MemoryCarry(memory, momentum, tail, ids)


class ContextBranch(nn.Module):
    """The two parts of `mac` on one layer, on either side of the exchange."""

    def __init__(
        self, width: int, attention_dim: int, config: MemoryConfig, norm_eps: float, *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.inputs = ContextInputs(width, config, norm_eps)
        self.core = ContextMemory(config, attention_dim, norm_eps, recompute=recompute)


def _where(rows: Tensor, yes: State, no: State | None = None) -> State:
    """Row by row, rows [batch] or [] bool; the empty state where `no` is None."""
    rows = rows.view(-1, 1, 1, 1)
    if no is None:
        return yes[0].where(rows, 0), yes[1].where(rows, 0)
    return yes[0].where(rows, no[0]), yes[1].where(rows, no[1])
