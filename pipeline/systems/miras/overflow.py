"""A memory of what leaves attention's window, and of nothing else (the attachment `overflow`).

It holds no document's token that attention still sees, so while nothing has left the window the layer is exactly the
backbone's. Attentive Hybrid Networks (arXiv 2510.07318) share the idea; there the cell is gated, here it is any rule of
the family. docs/attachments.md has the equations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from pipeline.ops.attention import WindowCarry
from pipeline.ops.attention_sinks import NO_TOKEN, latest
from pipeline.ops.checks import sum_dtype
from pipeline.ops.gates import GateLinear
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.memory import MemoryCarry, MemoryHealth, memory_health
from pipeline.systems.miras.rules import memory_rule

LayerBefore: TypeAlias = tuple[WindowCarry | None, MemoryCarry | None]
"""What a layer carries from the step before."""
SMALLEST_NORM = 1e-3
"""Queries, keys and values shorter than this are not stretched to unit length: the gradient of padding would have no
bound."""


@dataclass(frozen=True, eq=False)
class OverflowPlan:
    """Which tokens leave the window at the tokens of a step; shared by all layers."""

    window: int
    segment_ids: Tensor
    """[batch, tokens] int64, of the step's own tokens."""
    leaves: Tensor
    """[batch, tokens] bool: the token `window` places before is of the same document and no sink, so attention sees it
    no more from here on. Once true, it is true to the document's end."""
    same_document: Tensor
    """[batch] bool: the first token goes on with the document of the step before."""
    tail_segments: Tensor
    """[batch, window] int64: the documents of the tokens that leave next, -1 where there is no token."""
    written: bool = True
    """Whether what leaves is stored. Otherwise the memory stays empty, and its share of the output stays as it is."""


def plan_overflow(
    segment_ids: Tensor, positions: Tensor, before: tuple[Tensor, Tensor] | None, *, window: int, sinks: int
) -> OverflowPlan:
    """The plan of one step.

    Args:
        segment_ids, positions: [batch, tokens] int64, of the whole sequence.
        before: the same of the last `window` tokens before the step [batch, window]; None where there are none.
        window: keys that a query sees, itself included.
        sinks: first tokens of a document, which attention never loses.
    """
    if before is None:
        before = (segment_ids.new_full((segment_ids.shape[0], window), NO_TOKEN), positions.new_zeros(()))
    tokens = segment_ids.shape[1]
    ids = torch.cat([before[0], segment_ids], dim=1)
    places = torch.cat([before[1].expand_as(before[0]), positions], dim=1)
    leaves = (ids[:, :tokens] == segment_ids) & (places[:, :tokens] >= sinks)
    same_document = before[0][:, -1] == segment_ids[:, 0]
    return OverflowPlan(window, segment_ids, leaves, same_document, ids[:, tokens:].clone())


class OverflowInputs(nn.Module):
    """Logits of a token's step size and of the memory's share, from the layer's input: computed before the exchange."""

    def __init__(self, width: int, config: MemoryConfig, norm_eps: float) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.beta_proj = GateLinear(width, config.heads)
        self.share_proj = GateLinear(width, config.heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, sequence / degree, width] gives [batch, sequence / degree, heads, 2], float32."""
        precise = hidden.to(sum_dtype(hidden))
        # No weight of its own: the projections have them.
        normed = F.rms_norm(precise, precise.shape[-1:], eps=self.norm_eps)
        return torch.stack([self.beta_proj(normed), self.share_proj(normed)], dim=-1)


class OverflowMemory(nn.Module):
    """The memory of one layer, for this rank's heads: every head of attention has one of its own.

    Per head, with q_t, k_t, v_t the layer's own, before RoPE, A_t its attention to the window of W tokens and x_t its
    input, while token l = t - W of the document is no sink (before that, o_t = A_t):

        write (unit(f(k_l + k_l D_k)), v_l) into M with step size theta_l of the logit c x_l + a k_l
        r_t = M_t(unit(f(q_t + q_t D_q)))      the rule's own read
        o_t = (1 - g_t) A_t + g_t r_t          g_t = sigmoid(w x_t + u q_t + b), in front of the output projection

    f is SiLU or nothing (`key_activation`). D_k, D_q, w, u and a are zero at first. A rule whose reads have a size of
    their own (swiglu) is written unit(v_l), and its read is no larger than attention's: r_t = rms(A_t) x / sqrt(1 +
    mean(x^2)) of the rule's read x.
    """

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        self.config = config
        heads, dim = config.heads, config.head_dim
        self.rule = memory_rule(config)
        self.alpha_logits = nn.Parameter(torch.empty(heads))
        self.eta_logits = nn.Parameter(torch.empty(heads)) if config.has_momentum else None
        # What is added to the identity: in bfloat16 a small change of a 1 would be lost.
        self.q_map = nn.Parameter(torch.empty(heads, dim, dim))
        self.k_map = nn.Parameter(torch.empty(heads, dim, dim))
        self.share_query = nn.Parameter(torch.empty(heads, dim))
        self.step_key = nn.Parameter(torch.empty(heads, dim))

    def forward(
        self,
        logits: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attended: Tensor,
        plan: OverflowPlan,
        before: LayerBefore,
        topology: Topology,
    ) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
        """logits [batch, sequence, heads / degree, 2] of `OverflowInputs`, attention's q, k (before RoPE), v (of
        key-value heads) and output `attended` [batch, sequence, heads / degree, dim], and what the layer carries from
        the step `before`, give the output (like attended), the new carry and the health."""
        local = topology.heads(self.config.heads)
        batch, _, heads, _ = q.shape
        window, carry = before
        old_logits = None if carry is None else carry.tail
        leaving_k = _delayed(k, None if window is None else window.k, plan.window)
        leaving_v = _delayed(v, None if window is None else window.v, plan.window)
        beta = _delayed(logits[..., 0], None if old_logits is None else old_logits[..., 0], plan.window)
        leaves = plan.leaves[..., None]
        queries, keys, values, alpha, beta = self.rule_inputs(q, leaving_k, leaving_v, beta, leaves, local)
        if not plan.written:
            beta = torch.full_like(beta, -math.inf)
        if carry is None:
            state = self.rule.empty_state(batch, slice(0, heads), q)
        else:
            same = plan.same_document[:, None, None, None]
            state = (carry.memory.where(same, 0), carry.momentum.where(same, 0))
        read, (memory, momentum), gates = self.rule(
            queries, keys, values, alpha, beta, self.eta_logits, state, plan.segment_ids, local
        )
        out = self.mixed(read, attended, q, logits[..., 1], leaves, local)
        tail = latest(logits[..., :1], old_logits, plan.window, 0)
        new = MemoryCarry(memory.detach(), momentum.detach(), tail, plan.tail_segments)
        health = memory_health(self.config, new, beta, gates.alpha, gates.eta, gates.theta, leaves)
        return out, new, health

    def rule_inputs(
        self, q: Tensor, leaving_k: Tensor, leaving_v: Tensor, beta: Tensor, leaves: Tensor, local: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the rule takes: queries, keys, values, logits of forgetting and of the step size.

        q [batch, tokens, heads, dim]. Of what leaves the window at each token, where something does (`leaves` [batch,
        tokens, 1] bool): keys before RoPE and values [batch, tokens, key-value heads, dim], and the logits `beta` of
        the step size [batch, tokens, heads] as far as its layer's input gives them.
        """
        groups = q.shape[2] // leaving_k.shape[2]
        leaving_k = repeat(leaving_k, "batch tokens kv dim -> batch tokens (kv group) dim", group=groups)
        beta = beta + _score(leaving_k, self.step_key[local])
        keys = self._unit(leaving_k, "k", local)
        values = repeat(leaving_v, "batch tokens kv dim -> batch tokens (kv group) dim", group=groups)
        if self.rule.own_size:
            values = _unit_length(values.to(sum_dtype(q))).to(values.dtype)
        beta = beta.masked_fill(~leaves, -math.inf)
        alpha = self.alpha_logits[local].to(sum_dtype(q)).expand(beta.shape)
        return self._unit(q, "q", local), keys, values, alpha, beta

    def mixed(self, read: Tensor, attended: Tensor, q: Tensor, share: Tensor, leaves: Tensor, local: slice) -> Tensor:
        """The output: what was read in place of a share of what attention gave, where something has left; `share` are
        its logits [batch, tokens, heads]."""
        share = torch.sigmoid(share + _score(q, self.share_query[local])).masked_fill(~leaves, 0.0)
        share = share.to(attended.dtype)[..., None]
        if self.rule.own_size:
            read = _sized(read.to(sum_dtype(read)), attended.to(sum_dtype(attended)))
        return attended + share * (read.to(attended.dtype) - attended)

    def _unit(self, x: Tensor, which: str, local: slice) -> Tensor:
        """x [batch, tokens, heads, dim] mapped by each head's own map, of unit length after the activation."""
        change = (self.q_map if which == "q" else self.k_map)[local]
        x = x + rearrange(
            torch.matmul(rearrange(x, "batch tokens heads dim -> heads (batch tokens) dim"), change.to(x.dtype)),
            "heads (batch tokens) dim -> batch tokens heads dim", batch=x.shape[0],
        )  # fmt: skip
        precise = x.to(sum_dtype(x))
        if self.config.key_activation == "silu":
            precise = F.silu(precise)
        return _unit_length(precise).to(x.dtype)


class OverflowBranch(nn.Module):
    """The two parts of `overflow` on one layer, on either side of the exchange."""

    def __init__(self, width: int, config: MemoryConfig, norm_eps: float) -> None:
        super().__init__()
        self.inputs = OverflowInputs(width, config, norm_eps)
        self.core = OverflowMemory(config)


def _unit_length(x: Tensor) -> Tensor:
    """Vectors [..., dim] of unit length; those shorter than SMALLEST_NORM are shorter."""
    # A product with one number per token: the backward pass of F.normalize divides by an expanded norm.
    return x * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SMALLEST_NORM).reciprocal()


def _sized(read: Tensor, attended: Tensor) -> Tensor:
    """A read [..., dim] in the size of attention's output, which it does not exceed; small reads stay in proportion."""
    size = torch.linalg.vector_norm(attended, dim=-1, keepdim=True) / math.sqrt(attended.shape[-1])
    return read * size * torch.rsqrt(1 + read.square().mean(-1, keepdim=True))


def _score(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, tokens, heads, dim] times each head's weight [heads, dim]: [batch, tokens, heads], like x."""
    # In x's precision: a wider copy of all queries or keys would be kept for the backward pass.
    return torch.einsum("bthd,hd->bth", x, weight.to(x.dtype))


def _delayed(x: Tensor, before: Tensor | None, window: int) -> Tensor:
    """x [batch, tokens, ...] `window` places later: what stood there before the step, zeros where nothing did."""
    kept = x[:, : max(0, x.shape[1] - window)]
    if before is None:
        before = x.new_zeros(x.shape[0], window, *x.shape[2:])
    return torch.cat([before[:, : x.shape[1]].to(x.dtype), kept], dim=1)
