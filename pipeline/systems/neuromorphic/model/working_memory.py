"""Working memory: attention over the last tokens of a document."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from pipeline.ops.attention import Rope, WindowCarry, choose_attention, plan_window_attention, window_attention
from pipeline.ops.rope import rotate
from pipeline.systems.neuromorphic.state import Use

ROPE_BASE = 10_000.0


class WorkingMemory(nn.Module):
    """Windowed attention within documents, one for all columns: D -> E_w, D -> E_w, D -> E_w, and back to D.

    Keys and queries are turned by RoPE (arXiv 2104.09864), and keys have no bias. `rotated` False, as published:
    nothing says how far back a token is; keys have a bias, which no softmax sees.
    """

    def __init__(self, width: int, inner: int, heads: int, window: int, *, rotated: bool) -> None:
        super().__init__()
        self.heads, self.head_width, self.window, self.rotated = heads, inner // heads, window, rotated
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner, bias=not rotated)
        self.value = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)

    def forward(
        self, x: Tensor, segment_ids: Tensor, positions: Tensor, carry: WindowCarry | None, use: Use = "on"
    ) -> tuple[Tensor, WindowCarry | None]:
        """x [N, T, D], segment_ids and positions [N, T] -> what each token reads [N, T, D], and the carry of the last
        `window` tokens, in x's dtype. With a memory that is `empty` a token sees itself alone, and the carry stays as
        it is; one that is `absent` gives zeros."""
        if use == "absent":
            return torch.zeros_like(x), carry
        if use == "empty":
            return self.output(self.value(x)), carry
        q, k, v = (rearrange(m(x), "n t (h d) -> n t h d", h=self.heads) for m in (self.query, self.key, self.value))
        plan = plan_window_attention(
            segment_ids,
            positions,
            rope=self.rope(x.device),
            window=self.window,
            sinks=0,
            carry=carry,
            backend=choose_attention("window", 0, x.device.type, x.dtype, self.head_width),
            dtype=x.dtype,
        )
        out, carry = window_attention(q, k, v, plan, carry)
        return self.output(rearrange(out, "n t h d -> n t (h d)")), carry

    def rope(self, device: torch.device) -> Rope:
        """How queries and keys are turned: not at all as published."""
        # Made there: a copy from the host would wait for it.
        pairs = torch.arange(0, self.head_width, 2, dtype=torch.float64, device=device) / self.head_width
        return Rope(ROPE_BASE**-pairs if self.rotated else torch.zeros_like(pairs))

    @torch.no_grad()
    def statistics(
        self, x: Tensor, segment_ids: Tensor, positions: Tensor, carry: WindowCarry | None, queries: int
    ) -> dict[str, Tensor]:
        """Of the last `queries` tokens: `wm_entropy` [heads], of what each head attends to, in nats, and
        `wm_buffer_util`, the share of the window that a token sees. Takes what `forward` took; means over rows and
        tokens."""
        by_head = "n t (h d) -> n t h d"
        q = rearrange(self.query(x[:, -queries:]), by_head, h=self.heads)
        k = rearrange(self.key(x), by_head, h=self.heads)
        before = positions[:, -queries:]
        if carry is not None:
            k = torch.cat([carry.k.to(k.dtype), k], 1)
            segment_ids = torch.cat([carry.segment_ids, segment_ids], 1)
            positions = torch.cat([carry.positions, positions], 1)
        rope = self.rope(x.device)
        q, k = rotate(q, rope.rotation(before, q.dtype)), rotate(k, rope.rotation(positions, k.dtype))
        place = torch.arange(segment_ids.shape[1], device=x.device)
        distance = place[-queries:, None] - place
        seen = (distance >= 0) & (distance < self.window)
        seen = seen & (segment_ids[:, -queries:, None] == segment_ids[:, None])
        scores = torch.einsum("n t h d, n s h d -> n h t s", q, k).float() / math.sqrt(self.head_width)
        logs = scores.masked_fill(~seen[:, None], -math.inf).log_softmax(-1)
        entropy = -torch.where(seen[:, None], logs.exp() * logs, 0).sum(-1)
        return {"wm_entropy": entropy.mean((0, 2)), "wm_buffer_util": seen.sum(-1).float().mean() / self.window}
