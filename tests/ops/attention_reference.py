"""Attention as its definition reads: one query at a time, float64, no blocks, no carry."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_ids: Tensor,
    positions: Tensor,
    inverse_frequencies: Tensor,
    window: int | None = None,
    sinks: int = 0,
) -> Tensor:
    """[batch, tokens, heads, dim]; `window` None is full attention. A query and a key turn by their distance only."""
    batch, tokens, heads, dim = q.shape
    group = heads // k.shape[2]
    turns = inverse_frequencies.to(torch.float64)
    q_complex, k_complex = (torch.complex(*x.to(torch.float64).chunk(2, dim=-1)) for x in (q, k))
    k_complex, v = k_complex.repeat_interleave(group, 2), v.to(torch.float64).repeat_interleave(group, 2)
    rows = []
    for b in range(batch):
        for t in range(tokens):
            position = int(positions[b, t])
            seen, distances = [], []
            for i in range(t + 1):
                at = int(positions[b, i])
                if segment_ids[b, i] != segment_ids[b, t]:
                    continue
                if window is None or position - at < window:
                    seen.append(i)
                    distances.append(position - at)
                elif at < sinks:
                    seen.append(i)
                    distances.append(min(position, window + sinks - 1) - at)
            phase = torch.tensor(distances, dtype=torch.float64)[:, None] * turns
            turn = torch.polar(torch.ones_like(phase), phase)
            # [keys, heads]: Re <q turned by the distance, k>
            logits = (q_complex[b, t] * turn[:, None] * k_complex[b, seen].conj()).real.sum(-1) / math.sqrt(dim)
            rows.append((torch.softmax(logits, 0)[..., None] * v[b, seen]).sum(0))
    return torch.stack(rows).view(batch, tokens, heads, dim)


def pack(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """segment_ids and positions [batch, tokens] of rows that hold documents of these lengths."""
    ids = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    positions = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    return torch.stack(ids), torch.stack(positions)


def relative_error(have: Tensor, want: Tensor) -> float:
    """Of the whole tensor, in the Euclidean norm; a true zero (q's gradient when it sees one key) counts as 0.01."""
    have, want = (x.detach().to("cpu", torch.float64) for x in (have, want))
    return float((have - want).norm() / want.norm().clamp(min=1e-2))
