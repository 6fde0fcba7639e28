"""The memory branch: what one layer adds to the residual stream from its neural long-term memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pipeline.ops.checks import sum_dtype
from pipeline.ops.convolution import causal_convolution
from pipeline.ops.gates import GateLinear
from pipeline.parallel.exchange import to_heads, to_sequence
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.config import MemoryConfig
from pipeline.systems.miras.rules import memory_rule


class MemoryCarry(NamedTuple):
    """State of one layer's memory for this rank's heads; `heads` below is this rank's part of them."""

    memory: Tensor
    """M [batch, heads, rows, dim], float32; rows is dim for a matrix memory."""
    momentum: Tensor
    """S [batch, heads, rows, dim], float32."""
    tail: Tensor
    """The last conv - 1 tokens of (q, k, v) before the convolution [batch, conv - 1, heads, 3 dim]; the attachment mac
    keeps more of them, and more of each (attachments.py)."""
    tail_segments: Tensor
    """Their segment ids [batch, conv - 1] int64; -1 where there is no token."""


class MemoryHealth(NamedTuple):
    """Sums over this rank's heads (and tokens), for the log; `count` is what each is averaged over."""

    memory_norm: Tensor
    momentum_norm: Tensor
    states: Tensor
    alpha: Tensor
    eta: Tensor
    theta: Tensor
    half_life: Tensor
    gates: Tensor
    opened: Tensor
    """Sum over tokens of the mean over all heads of the write gates, as the sigmoid gives them before it is stretched
    and cut. With its graph where there is a penalty on it."""


class MemoryBranch(nn.Module):
    """RMS norm, projections, short causal convolution, unit keys and queries, the scan, per-head norm, persistent
    pairs, a low-rank output gate, and an output projection that starts at zero (Titans, arXiv 2501.00663, section 4).
    """

    def __init__(self, width: int, config: MemoryConfig, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.alpha_proj = GateLinear(width, config.heads)
        self.beta_proj = GateLinear(width, config.heads)
        # Not the rule's own: a checkpoint knows it by this name.
        self.eta_logits = nn.Parameter(torch.empty(config.heads)) if config.has_momentum else None
        self.rule = memory_rule(config)
        self.conv = nn.Parameter(torch.empty(config.heads, config.conv, 3 * config.head_dim))
        self.head_norm = nn.Parameter(torch.empty(config.heads, config.head_dim))
        self.persistent_k = nn.Parameter(torch.empty(config.heads, config.persistent, config.head_dim))
        self.persistent_v = nn.Parameter(torch.empty(config.heads, config.persistent, config.head_dim))
        self.gate_down = nn.Linear(width, config.gate_rank, bias=False)
        self.gate_up = nn.Linear(config.gate_rank, inner)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.norm_eps = norm_eps

    def forward(
        self, hidden: Tensor, segment_ids: Tensor, carry: MemoryCarry | None, topology: Topology
    ) -> tuple[Tensor, MemoryCarry, MemoryHealth]:
        """hidden [batch, sequence / degree, width] and segment_ids [batch, sequence] give what is added to the residual
        stream (like hidden), the new carry and the health."""
        config = self.config
        local = topology.heads(config.heads)
        normed, qkv, logits = self.inputs(hidden)
        qkv, logits = to_heads([qkv, logits], topology)

        if carry is None:
            carry = self.empty_carry(qkv)
        mixed, tail, tail_segments = self._convolve(qkv, segment_ids, carry, self.conv[local])
        q, k, v = unit_keys(mixed, config)
        # The state belongs to the document of the last token before this step; another document starts from zero.
        same_document = (carry.tail_segments[:, -1] == segment_ids[:, 0])[:, None, None, None]
        state = (carry.memory.where(same_document, 0), carry.momentum.where(same_document, 0))
        read, (memory, momentum), gates = self.rule(
            q, k, v, logits[..., 0], logits[..., 1], self.eta_logits, state, segment_ids, local
        )
        (read,) = to_sequence([self.found(read, q, local)], topology)
        out = self.output(read, normed)
        new = MemoryCarry(memory.detach(), momentum.detach(), tail, tail_segments)
        health = memory_health(config, new, logits[..., 1], gates.alpha, gates.eta, gates.theta)
        return out, new, health

    def inputs(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of hidden [batch, tokens, width]: the same normed; queries, keys and values before the convolution [batch,
        tokens, heads, 3 dim]; logits of forgetting and of the step size [batch, tokens, heads, 2] float32."""
        normed = self.norm(hidden)

        def split(x: Tensor) -> Tensor:
            return rearrange(x, "batch sequence (heads dim) -> batch sequence heads dim", heads=self.config.heads)

        qkv = torch.cat([split(proj(normed)) for proj in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        precise = normed.to(sum_dtype(hidden))
        return normed, qkv, torch.stack([self.alpha_proj(precise), self.beta_proj(precise)], dim=-1)

    def found(self, read: Tensor, q: Tensor, local: slice) -> Tensor:
        """What the memory says of queries [batch, tokens, heads, dim]: its read, normed, and the persistent pairs'."""
        return self._head_norm(read, self.head_norm[local]) + self._persistent(q, local)

    def output(self, read: Tensor, normed: Tensor) -> Tensor:
        """What is added to the residual stream, of what was `found` [batch, tokens, all heads, dim] and the normed
        input [batch, tokens, width]."""
        gate = torch.sigmoid(self.gate_up(self.gate_down(normed)))
        read = rearrange(read, "batch sequence heads dim -> batch sequence (heads dim)")
        return self.o_proj(read.to(gate.dtype) * gate)

    def empty_carry(self, qkv: Tensor) -> MemoryCarry:
        """The carry before any token, for this rank's heads of `qkv` [batch, sequence, heads, 3 dim]."""
        batch, _, heads, _ = qkv.shape
        dim, tail = self.config.head_dim, self.config.conv - 1
        return MemoryCarry(
            *self.rule.empty_state(batch, slice(0, heads), qkv),
            qkv.new_zeros(batch, tail, heads, 3 * dim),
            torch.full((batch, tail), -1, dtype=torch.int64, device=qkv.device),
        )

    def _convolve(
        self, qkv: Tensor, segment_ids: Tensor, carry: MemoryCarry, kernel: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.cat([carry.tail.to(qkv.dtype), qkv], dim=1)
        segments = torch.cat([carry.tail_segments, segment_ids], dim=1)
        length = qkv.shape[1]
        # Copies: a slice would keep the whole step's tokens alive until the next step.
        tail, tail_segments = tokens[:, length:].detach().clone(), segments[:, length:].clone()
        return causal_convolution(tokens, segments, kernel), tail, tail_segments

    def _head_norm(self, read: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(read, (read.shape[-1],), eps=self.norm_eps) * weight

    def _persistent(self, q: Tensor, local: slice) -> Tensor:
        if self.config.persistent == 0:
            return torch.zeros_like(q)
        scores = torch.einsum("bthd,hnd->bthn", q, self.persistent_k[local])
        return torch.einsum("bthn,hnd->bthd", scores.softmax(dim=-1), self.persistent_v[local])


def activated(qkv: Tensor, config: MemoryConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of [..., 3 dim] after the convolution; values have SiLU whatever the keys have."""
    if config.key_activation == "silu":
        q, k, v = F.silu(qkv).chunk(3, dim=-1)
    else:
        q, k, v = qkv.chunk(3, dim=-1)
        v = F.silu(v)
    return q, k, v


def unit_keys(qkv: Tensor, config: MemoryConfig) -> tuple[Tensor, Tensor, Tensor]:
    """As `activated`, with queries and keys of unit length."""
    q, k, v = activated(qkv, config)
    return unit(q), unit(k), v


def unit(x: Tensor) -> Tensor:
    """x [..., dim] of unit length, found in float32 at the least."""
    return F.normalize(x.to(sum_dtype(x)), dim=-1).to(x.dtype)


def memory_health(
    config: MemoryConfig,
    carry: MemoryCarry,
    write_logits: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    written: Tensor | None = None,
) -> MemoryHealth:
    """Sums over the states of a carry, over the write gates' logits of this step's tokens, and over gates [batch,
    sequence, heads]; of the gates, those of the tokens that are `written` alone where [batch, sequence, 1] bool says
    so."""
    # Nothing else needs its graph, which would live as long as the step.
    write_logits = write_logits if config.write_penalty else write_logits.detach()
    opened = torch.sigmoid(write_logits).sum() / config.heads
    alpha, eta, theta = alpha.detach(), eta.detach(), theta.detach()
    # Half-life of what is stored: forgetting, and overwriting at the rate theta / ((1 - eta) d) of random keys.
    rate = -torch.log1p(-alpha) - torch.log1p(-(theta / ((1 - eta) * config.head_dim)).clamp(max=0.999))
    count = alpha.new_full((), alpha.numel(), dtype=torch.float64)
    half_life = math.log(2) / rate
    if written is not None:
        count = (written.sum() * alpha.shape[-1]).to(torch.float64)
        alpha, eta, theta, half_life = (x.where(written, 0) for x in (alpha, eta, theta, half_life))
    return MemoryHealth(
        carry.memory.flatten(2).norm(dim=-1).sum(),
        carry.momentum.flatten(2).norm(dim=-1).sum(),
        alpha.new_full((), carry.memory.shape[0] * carry.memory.shape[1], dtype=torch.float64),
        alpha.sum(),
        eta.sum(),
        theta.sum(),
        half_life.sum(),
        count,
        opened,
    )


def health_metrics(health: Sequence[MemoryHealth]) -> dict[str, tuple[Tensor, Tensor]]:
    """The health of all memories of a step, each metric as (sum, count); none without a memory."""
    if not health:
        return {}
    total = MemoryHealth(
        *(torch.stack([getattr(state, name).detach() for state in health]).sum() for name in MemoryHealth._fields)
    )
    return {
        "norm_M": (total.memory_norm, total.states),
        "norm_S": (total.momentum_norm, total.states),
        "memory/alpha": (total.alpha, total.gates),
        "memory/eta": (total.eta, total.gates),
        "memory/theta": (total.theta, total.gates),
        "memory/half_life": (total.half_life, total.gates),
    }
