"""The scan of a SwiGLU memory in large chunks: read with the weights of the chunk's start, then one update.

All products are of a whole chunk with whole weight matrices, so a device runs them at the speed of matrix products,
where chunks of some tens of tokens are bound by memory traffic. A token reads nothing of its own chunk.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from pipeline.ops import chunks
from pipeline.ops.checks import check_chunk_start, check_initial, sum_dtype
from pipeline.ops.chunks import boundaries, learns, scan_spans
from pipeline.ops.muon import newton_schulz

_NORM_FLOOR = 1e-6


class Weights(NamedTuple):
    """Of the memories of N rows; f(x) = (silu(x gate^T) o (x up^T)) down."""

    gate: Tensor  # [N, hidden, dim]
    up: Tensor  # [N, hidden, dim]
    down: Tensor  # [N, hidden, dim]


def swiglu_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    initial: tuple[Tensor, Tensor, Tensor],
    *,
    muon: bool = False,
    state: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
    chunk: int = 2048,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Read a chunk of tokens with the weights of its start, then update the weights once with all of them.

    Per batch row and head, with row vectors and f(x; W) = (silu(x W_gate^T) o (x W_up^T)) W_down::

        y_t = f(q_t; W)                                  for all tokens of the chunk
        U = -sum_t theta_t grad_W (-f(k_t; W) . v_t)     gradients at the CHUNK'S START
        S' = mean(eta) S + U                             momentum of chunks
        W' = W0 + prod(1 - alpha) (W - W0) + S'          S' orthogonalised per matrix with ``muon``
        W' scaled to the initial norms: of each row of W_gate and W_up, of each column of W_down

    The norms bound the memory whatever the gates are. ``chunk`` is part of the result, and chunks are counted from the
    first token of the call. A token reads what earlier chunks of its own segment wrote: where a segment begins inside a
    chunk, its tokens there read the initial weights. Only tokens of the chunk's last segment write, and the memory
    restarts from the initial weights, without momentum, when that segment began in the chunk.

    Args:
        q, k, v: ``[batch, sequence, heads, dim]``, values as wide as keys; float64, float32, bfloat16 or
            float16.
        alpha, eta, theta: as in ``miras_scan``; means and products run over the tokens that write. eta None: no
            momentum.
        initial: W0 as (gate, up, down), each ``[heads, hidden, dim]``, rows by hidden unit.
        muon: orthogonalise the update of each matrix (``newton_schulz``); theta then weighs tokens against each other,
            and no longer says how far a step goes.
        state: (D, S) before the first token, each ``[batch, heads, 3 hidden, dim]``: W - W0 and the momentum, gate
            above up above down; float32 (float64 when q is). Zeros, the initial weights themselves, when None.
        segment_ids: ``[batch, sequence]`` integers; ``state`` belongs to the first token's segment.
        chunk: tokens of one update.

    Returns:
        y, ``[batch, sequence, heads, dim]`` in v's dtype, and (D, S) after the last token, whose chunk may be short.
        Everything is differentiable. Sums are in float32, or float64 when q is.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.

    Source: "Test-Time Training Done Right" (LaCT, arXiv 2505.23884), section 3; forgetting is an addition, alpha = 0 is
    the paper's rule.
    """
    (_, _, heads, dim), hidden = q.shape, initial[0].shape[1] if initial[0].dim() == 3 else 0
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    check_chunk_start(q, k, v, gates, state, segment_ids, chunk, state_shape=(3 * hidden, dim))
    names = ("initial[0] (gate)", "initial[1] (up)", "initial[2] (down)")
    check_initial(q, v, dict(zip(names, initial, strict=True)), (heads, hidden, dim))
    # Autocast would turn the sums to bfloat16 behind the float32 state.
    with torch.autocast(device_type=q.device.type, enabled=False):
        return _swiglu_scan(q, k, v, alpha, eta, theta, initial, muon, state, segment_ids, chunk)


def kept_bytes(
    rows: int, sequence: int, dim: int, hidden: int, *, chunk: int, muon: bool = False, element: int = 4
) -> int:
    """What a scan whose chunks are not recomputed keeps, about; ``rows`` is batch x heads, ``element`` the bytes of its
    sums."""
    chunk = min(chunk, sequence)
    token = 5 * dim + 20 * hidden + (15 + (40 if muon else 0)) * hidden * dim // chunk
    return element * rows * sequence * token


def _swiglu_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    initial: tuple[Tensor, Tensor, Tensor],
    muon: bool,
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    chunk: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dtype = sum_dtype(q)
    (batch, sequence, heads, dim), hidden = q.shape, initial[0].shape[1]
    _, inside = boundaries(segment_ids, chunk, heads)
    writes = None
    if segment_ids is not None:
        writes = repeat(_writers(segment_ids, chunk), "batch sequence -> batch sequence heads", heads=heads)
    shape = (batch * heads, 3 * hidden, dim)
    if state is None:
        carry = q.new_zeros((*shape[:2], 2 * dim), dtype=dtype)
    else:
        carry = rearrange(torch.cat(state, dim=-1), "batch heads rows columns -> (batch heads) rows columns")
    w0 = Weights(*(repeat(w.to(dtype), "heads hidden dim -> (batch heads) hidden dim", batch=batch) for w in initial))
    inputs = (q, k, v, 1 - alpha, eta, theta, inside, writes)
    kept = kept_bytes(batch * heads, sequence, dim, hidden, chunk=chunk, muon=muon, element=dtype.itemsize)
    recompute = learns((*inputs, *initial, carry)) and kept > chunks.KEEP
    body = partial(_chunk, initial=w0, muon=muon)
    y, carry, _ = scan_spans(body, inputs, carry, span=chunk, recompute=recompute)
    memory, momentum = (part.unflatten(0, (batch, heads)).contiguous() for part in carry.chunk(2, dim=-1))
    return y.to(v.dtype), (memory, momentum)


def _writers(segment_ids: Tensor, chunk: int) -> Tensor:
    """[batch, sequence] bool: no other segment follows in the token's chunk."""
    length = segment_ids.shape[1]
    ends = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (0, 1), value=True)
    # What follows the last token is padding, and no other segment; a chunk's last token ends nothing within it.
    padded = F.pad(ends, (0, -length % chunk), value=True)
    chunks = rearrange(padded, "batch (chunks tokens) -> batch chunks tokens", tokens=chunk).clone()
    chunks[..., -1] = True
    writes = chunks.int().flip(-1).cumprod(dim=-1).flip(-1).bool()
    return rearrange(writes, "batch chunks tokens -> batch (chunks tokens)")[:, :length]


def _chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retain: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    inside: Tensor | None,
    writes: Tensor | None,
    carry: Tensor,
    *,
    initial: Weights,
    muon: bool,
) -> tuple[Tensor, Tensor, None]:
    """One chunk; carry [N, 3 hidden, 2 dim] is D beside S."""
    dim = q.shape[-1]

    def by_head(x: Tensor) -> Tensor:
        return rearrange(x.to(carry.dtype), "batch tokens heads ... -> (batch heads) tokens ...")

    offset, momentum = carry.split(dim, dim=-1)
    # The chunk's own state is the last token's: that of the chunk's start, or an empty one where its segment is new.
    same_document = None if inside is None else by_head(inside[:, -1:]).unsqueeze(-1)
    y = apply_swiglu(by_head(q), moved_weights(initial, offset))
    if inside is not None:
        y = torch.where(by_head(inside).unsqueeze(-1) > 0, y, apply_swiglu(by_head(q), initial))

    retain, theta = by_head(retain), by_head(theta)
    count: Tensor | int = retain.shape[1]
    if same_document is not None and writes is not None:
        offset, momentum = offset * same_document, momentum * same_document
        written = by_head(writes)
        retain, theta, count = torch.where(written > 0, retain, 1.0), theta * written, written.sum(dim=1)
        eta = None if eta is None else by_head(eta) * written
    else:
        eta = None if eta is None else by_head(eta)
    update = torch.cat(ascent(by_head(k), by_head(v), theta, moved_weights(initial, offset)), dim=-2)
    if eta is not None:
        update = (eta.sum(dim=1) / count)[:, None, None] * momentum + update
    moved = offset * _product(retain)[:, None, None]
    steps = update.chunk(3, dim=-2)
    moved = moved + torch.cat([newton_schulz(step) for step in steps] if muon else list(steps), dim=-2)
    after = renormalise(moved_weights(initial, moved), initial)
    offset = torch.cat([now - start for now, start in zip(after, initial, strict=True)], dim=-2)
    heads = q.shape[2]
    y = rearrange(y, "(batch heads) tokens dim -> batch tokens heads dim", heads=heads)
    return y, torch.cat([offset, update], dim=-1), None


def _product(x: Tensor) -> Tensor:
    """Product of [N, C] over C, by halves: the backward pass of ``prod`` waits for the device to look for zeros."""
    while x.shape[1] > 1:
        x = F.pad(x, (0, x.shape[1] % 2), value=1.0)
        x = x[:, ::2] * x[:, 1::2]
    return x[:, 0]


def moved_weights(initial: Weights, offset: Tensor) -> Weights:
    return Weights(*(w + part for w, part in zip(initial, offset.chunk(3, dim=-2), strict=True)))


def apply_swiglu(x: Tensor, w: Weights) -> Tensor:
    return (F.silu(x @ w.gate.mT) * (x @ w.up.mT)) @ w.down


def ascent(k: Tensor, v: Tensor, theta: Tensor, w: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tokens of theta times the gradient of f(k) . v in (gate, up, down); theta [N, C]."""
    before, up = k @ w.gate.mT, k @ w.up.mT
    sigmoid = torch.sigmoid(before)
    gate = before * sigmoid
    weighted = v * theta.unsqueeze(-1)
    back = weighted @ w.down.mT
    slope = sigmoid * (1 + before * (1 - sigmoid))
    return (back * up * slope).mT @ k, (back * gate).mT @ k, (gate * up).mT @ weighted


def renormalise(w: Weights, initial: Weights) -> Weights:
    """Weights whose rows (gate, up) and columns (down) are as long as the initial ones."""
    parts = []
    for now, start, dim in zip(w, initial, (-1, -1, -2), strict=True):
        lengths = ((x.square().sum(dim=dim, keepdim=True) + _NORM_FLOOR**2).sqrt() for x in (start, now))
        wanted, found = lengths
        parts.append(now * (wanted / found))
    return Weights(*parts)
