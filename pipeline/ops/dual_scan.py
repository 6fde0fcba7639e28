"""The chunk-start scan: a memory that is a link of a dual state, written with gradients of the chunk's start.

Per head and chunk of C tokens, with A and S the dual state and momentum at the chunk's start, W = link(A), and
coefficients beta, f, G, E of the gates as ``scan_torch`` has them::

    R = error(K W - V)                            row t for token t, all at the same W
    A_t = beta_t A + f_t S - sum_{j <= t} G_tj k_j^T R_j
    y_t = q_t link(A_t)
    A' = A_C,  S' = m_C S - sum_j E_Cj k_j^T R_j

Without a link the reads need no A_t: y = beta Q A + f Q S - ((Q K^T) o G) R. With one, every A_t exists for a moment:
they are made for a block of tokens at a time, and again in the backward pass when a call is large.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.ops import chunks
from pipeline.ops.checks import check_chunk_start, check_clip, sum_dtype
from pipeline.ops.chunks import (
    advance,
    boundaries,
    coefficients,
    from_chunks,
    learns,
    outer,
    scan_spans,
    span_tokens,
    stack_state,
    to_chunks,
    unstack_state,
)
from pipeline.ops.dual_maps import ErrorMap, Link, shrink, squared_error

# Elements of a block's memories (its tokens x batch x heads x key dim x value dim), and its most tokens.
_BLOCK_CPU = 2**20
_BLOCK_GPU = 2**26
_BLOCK_TOKENS = 16


class _Maps(NamedTuple):
    """What the variant chooses."""

    error: ErrorMap
    link: Link | None
    clip: float | None


def dual_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    error: ErrorMap = squared_error,
    link: Link | None = None,
    threshold: Tensor | None = None,
    clip: float | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
    chunk: int = 16,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Write tokens into a memory by gradients taken at the start of their chunk, and read it after every token.

    Per batch row and head, with q, k and v as row vectors and c the last token before t's chunk::

        g_t = k_t^T error(k_t link(A_c) - v_t)     gradient at the CHUNK'S START, not at token t's memory
        S_t = eta_t S_{t-1} - theta_t g_t          momentum
        A_t = (1 - alpha_t) A_{t-1} + S_t          the dual state forgets
        y_t = q_t link(A_t)                        read after write, through the link of this very token

    So ``chunk`` is part of the result, unlike in ``miras_scan``: a chunk of one token is the rule itself, and large
    ones overshoot where keys repeat within a chunk (theta times the largest eigenvalue of K^T K above about 2). Chunks
    are counted from the first token of the call. Where a segment begins inside a chunk, the state restarts at
    zero, and the gradients of its tokens in that chunk are taken at link(0).

    Args:
        q, k, v, alpha, eta, theta: as in ``miras_scan``; eta None: no momentum.
        error: error map, e.g. ``dual_maps.PNormError``.
        link: link, e.g. ``dual_maps.QNormLink``; None is the identity.
        threshold: threshold of the error map per token, ``[batch, sequence, heads]``, float32 or float64.
        clip: largest norm |k_t| |R_t| of a token's gradient, or None. Longer ones are shortened to it, as if theta were
            smaller.
        state: (A, S) before the first token, each ``[batch, heads, key dim, value dim]``, float32 (float64 when q is).
            Zeros when None.
        segment_ids: ``[batch, sequence]`` integers; the state restarts where the id changes; ``state`` belongs to the
            first token's segment.
        chunk: tokens whose gradients are taken together.

    Returns:
        y, ``[batch, sequence, heads, value dim]`` in v's dtype, and (A, S) after the last token; without momentum S is
        the last update. Everything is differentiable, the given and the returned state included. Sums are in float32,
        or float64 when q is, also under autocast.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.

    Source: MIRAS (arXiv 2504.13173), the variants' chunked training; Titans (arXiv 2501.00663) for the momentum.
    """
    gates = {"alpha": alpha, "eta": eta, "theta": theta, "threshold": threshold}
    check_chunk_start(q, k, v, gates, state, segment_ids, chunk, state_shape=(q.shape[-1], v.shape[-1]))
    check_clip(clip)
    # Autocast would turn the sums to bfloat16 behind the float32 state.
    with torch.autocast(device_type=q.device.type, enabled=False):
        maps = _Maps(error, link, clip)
        return _dual_scan(q, k, v, alpha, eta, theta, threshold, maps, state, segment_ids, chunk)


def kept_bytes(
    rows: int, sequence: int, key_dim: int, value_dim: int, *, states: int, chunk: int, copies: int, element: int = 4
) -> int:
    """What a scan whose spans are not recomputed keeps, about; ``rows`` is batch x heads, ``element`` the bytes of its
    sums, ``copies`` those of its link, 0 without one."""
    chunk = min(chunk, sequence)
    token = (2 + 2 * states) * key_dim + 4 * value_dim + (4 + states) * chunk + 8 * states
    token += states * key_dim * value_dim * 2 // chunk
    token += copies * key_dim * value_dim
    return element * rows * sequence * token


def block_tokens(rows: int, key_dim: int, value_dim: int, *, chunk: int, device_type: str) -> int:
    """Tokens whose memories exist at the same time under a link; it divides the chunk."""
    limit = (_BLOCK_CPU if device_type == "cpu" else _BLOCK_GPU) // (rows * key_dim * value_dim)
    return max(size for size in range(1, max(1, min(limit, _BLOCK_TOKENS, chunk)) + 1) if chunk % size == 0)


def linked_span(sequence: int, chunk: int, block: int) -> int:
    """Tokens that are recomputed together under a link: a state is kept at every span's start, and while one is
    recomputed at every of its blocks' starts, which makes about as many of either."""
    return chunk * math.ceil(math.sqrt(sequence * block) / chunk)


def _dual_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    threshold: Tensor | None,
    maps: _Maps,
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    chunk: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dtype, device = sum_dtype(q), q.device.type
    (batch, sequence, heads, key_dim), value_dim = k.shape, v.shape[-1]
    rows, states = batch * heads, 1 if eta is None else 2
    keep, inside = boundaries(segment_ids, chunk, heads)
    # The chunk itself is not cut to the sequence: where chunks begin is part of the result, how they end is not.
    sizes = {"key_dim": key_dim, "value_dim": value_dim}
    carry = stack_state(state, states, (batch, heads, key_dim, value_dim), q.new_empty(0, dtype=dtype))
    inputs = (q, k, v, 1 - alpha, eta, theta, keep, inside, threshold)
    copies = 0 if maps.link is None else maps.link.copies
    kept = kept_bytes(rows, sequence, **sizes, states=states, chunk=chunk, copies=copies, element=dtype.itemsize)
    recompute = learns((*inputs, carry)) and kept > chunks.KEEP
    span = span_tokens(rows, **sizes, states=states, chunk=chunk, device_type=device)
    if maps.link is None:
        block = min(chunk, sequence)
    else:
        block = block_tokens(rows, **sizes, chunk=chunk, device_type=device)
        if recompute:
            span = linked_span(sequence, chunk, block)
    recompute = recompute and sequence > span
    body = partial(_span, maps=maps, chunk=chunk, block=block, recompute=recompute)
    y, carry, update = scan_spans(body, inputs, carry, span=span, recompute=recompute)
    return y.to(v.dtype), unstack_state(carry, update, states, batch, heads)


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retain: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    keep: Tensor | None,
    inside: Tensor | None,
    threshold: Tensor | None,
    carry: Tensor,
    *,
    maps: _Maps,
    chunk: int,
    block: int,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, length, heads, key_dim = q.shape
    last = (length - 1) % block
    q, k, v, theta, retain = (to_chunks(x, block, carry.dtype) for x in (q, k, v, theta, retain))
    eta, keep, inside, threshold = (
        None if x is None else to_chunks(x, block, carry.dtype) for x in (eta, keep, inside, threshold)
    )
    c = coefficients(retain, eta, theta, keep, last)
    update_keys = outer(c.update_end, k)
    # Unbound, not indexed: the gradient of an index is as large as what it is taken from.
    ends, writes = c.state_end.unbind(0), update_keys.unbind(0)
    per_chunk = 1 if maps.link is None else chunk // block
    groups = k.split(per_chunk)
    own = [None] * len(groups) if inside is None else inside.unsqueeze(-1).split(per_chunk)
    cuts = [None] * len(groups) if threshold is None else threshold.unsqueeze(-1).split(per_chunk)
    starts, signals, reads = [], [], []
    place = 0
    reading = zip(c.state.unbind(0), c.update.unbind(0), q.unbind(0), k.unbind(0), strict=True)
    for keys, values, in_segment, cut in zip(groups, v.split(per_chunk), own, cuts, strict=True):
        signal = _signal(maps, keys, values, carry[:, :key_dim], in_segment, cut)
        for part in signal.unbind(0):
            if maps.link is None:
                starts.append(carry)
            else:
                arguments = (maps.link, *next(reading), part, carry)
                if recompute:
                    read = checkpoint(_read, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    read = _read(*arguments)
                reads.append(read)
            carry = advance(ends[place], carry) - writes[place].mT @ part
            signals.append(part)
            place += 1
    if maps.link is None:
        y = outer(c.state, q) @ torch.stack(starts) - ((q @ k.mT) * c.update) @ torch.stack(signals)
    else:
        y = torch.stack(reads)
    update = None
    if eta is None:
        key = theta[-1, :, last, None] * k[-1, :, last]
        update = -key.unsqueeze(-1) * signals[-1][:, last].unsqueeze(-2)
    return from_chunks(y, batch, heads, length), carry, update


def _signal(
    maps: _Maps, keys: Tensor, values: Tensor, dual: Tensor, inside: Tensor | None, threshold: Tensor | None
) -> Tensor:
    """Error signals [blocks, N, block, value dim] of a chunk, at its start's memory link(dual).

    dual is [N, key dim, value dim]. Tokens that are not ``inside`` the segment of the chunk's start have theirs taken
    at link(0).
    """
    memory = dual if maps.link is None else maps.link(dual)
    recalled = keys @ memory
    if inside is not None:
        if maps.link is None:
            recalled = recalled * inside
        else:
            empty = maps.link(torch.zeros_like(dual[:1]))
            recalled = torch.where(inside.bool(), recalled, keys @ empty)
    signal = maps.error(recalled - values, threshold)
    if maps.clip is not None:
        squared = keys.square().sum(dim=-1, keepdim=True) * signal.square().sum(dim=-1, keepdim=True)
        signal = signal * shrink(squared, maps.clip)
    return signal


def _read(link: Link, state: Tensor, update: Tensor, q: Tensor, k: Tensor, signal: Tensor, carry: Tensor) -> Tensor:
    """Reads of a block's tokens [N, block, value dim], each from its own memory."""
    rows, states = carry.shape[0], state.shape[-1]
    written = (k.unsqueeze(-1) * signal.unsqueeze(-2)).flatten(-2)
    dual = state @ carry.view(rows, states, -1) - update @ written
    memory = link(dual.unflatten(-1, (k.shape[-1], signal.shape[-1])))
    return (q.unsqueeze(-2) @ memory).squeeze(-2)
