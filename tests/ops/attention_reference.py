"""Attention as its definition reads: one query at a time, float64, no blocks, no carry. FlexAttention, dense."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


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


def dense_flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """FlexAttention as its kernel reads a BlockMask: full tiles skip mask_mod, absent tiles are never looked at. In the
    place of `pipeline.ops.attention_flex._fused_flex`."""
    batch, tokens, length = q.shape[0], q.shape[2], k.shape[2]
    rows = block_mask.kv_num_blocks.shape[0]
    assert rows in (1, batch)
    b, i, j = torch.meshgrid(torch.arange(batch), torch.arange(tokens), torch.arange(length), indexing="ij")
    tile = block_mask.BLOCK_SIZE[0]

    def spread(counts: Tensor, indices: Tensor) -> Tensor:
        tiles = torch.zeros(batch, -(-tokens // tile), -(-length // tile), dtype=torch.bool)
        for row, column in torch.ones_like(tiles[..., 0]).nonzero().tolist():
            of = row % rows
            tiles[row, column, indices[of, 0, column, : counts[of, 0, column]].long()] = True
        return tiles[b, i // tile, j // tile]

    partial = spread(block_mask.kv_num_blocks, block_mask.kv_indices)
    every = spread(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert not (partial & every).any()
    seen = (partial & block_mask.mask_mod(b, 0, i, j)) | every
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias.repeat_interleave(group, 1)[:, :, None]
    logits = logits.masked_fill(~seen[:, None], -math.inf)
    out = torch.softmax(logits, -1) @ v.repeat_interleave(group, 1)
    return out, torch.logsumexp(logits, -1)
