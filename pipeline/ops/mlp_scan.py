"""The scan of a two-layer memory: a perceptron per head, written with gradients of the chunk's start.

The weights are W = W0 + D with learned initial weights W0 and a state D (zero in an empty memory), so forgetting pulls
towards the initial weights, and a state that is carried stays one when they learn. Per chunk of C tokens, with D and S
at its start and beta, f, G, E of the gates as ``scan_torch`` has them::

    Z = K W1^T,  X = gelu(Z),  e = X W2 - V,  B = (e W2^T) o gelu'(Z)        gradients B^T K of W1, X^T e of W2
    H = gelu(Q W01^T + beta Q D1^T + f Q S1^T - ((Q K^T) o G) B)
    Y = H W02 + beta H D2 + f H S2 - ((H X^T) o G) e

No token has weights of its own: a gradient is of rank 1 in either layer, so what a token reads is two small products
with the chunk's keys and errors.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from einops import repeat
from torch import Tensor

from pipeline.ops import chunks
from pipeline.ops.checks import check_chunk_start, check_clip, check_initial, sum_dtype
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
from pipeline.ops.dual_maps import shrink


def mlp_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    initial: tuple[Tensor, Tensor],
    *,
    clip: float | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    segment_ids: Tensor | None = None,
    chunk: int = 16,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Write tokens into a two-layer memory by gradients taken at the start of their chunk, and read it after every one.

    Per batch row and head, with row vectors, f(x; W) = gelu(x W1^T) W2, and c the last token before t's chunk::

        g_t = gradient of 1/2 |f(k_t; W0 + D_c) - v_t|^2 in (W1, W2)    at the CHUNK'S START
        S_t = eta_t S_{t-1} - theta_t g_t
        D_t = (1 - alpha_t) D_{t-1} + S_t                               forgets towards the initial weights
        y_t = f(q_t; W0 + D_t)                                          read after write

    ``chunk`` is part of the result. Chunks are counted from the first token of the call. Where a segment begins inside
    a chunk, the memory restarts at the initial weights, without momentum, and the gradients of its tokens in that
    chunk are taken there.

    Args:
        q, k, v: ``[batch, sequence, heads, dim]``, values as wide as keys; float64, float32, bfloat16 or
            float16.
        alpha, eta, theta: as in ``miras_scan``; eta None: no momentum.
        initial: (W1, W2), each ``[heads, hidden, dim]``: rows are the hidden units' incoming and outgoing weights.
        clip: largest norm of a token's gradient over both layers, sqrt(|k|^2 |b|^2 + |x|^2 |e|^2), or None. Longer ones
            are shortened to it, as if theta were smaller.
        state: (D, S) before the first token, each ``[batch, heads, 2 hidden, dim]``, the rows of W1 above those of W2;
            float32 (float64 when q is). Zeros, the initial weights themselves, when None.
        segment_ids: ``[batch, sequence]`` integers; the memory restarts where the id changes; ``state`` belongs to the
            first token's segment.
        chunk: tokens whose gradients are taken together.

    Returns:
        y, ``[batch, sequence, heads, dim]`` in v's dtype, and (D, S) after the last token; without momentum S is the
        last update. Everything is differentiable. Sums are in float32, or float64 when q is.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.

    Source: Titans (arXiv 2501.00663), section 3, with a memory of depth 2 and the loss halved.
    """
    (_, _, heads, dim), hidden = q.shape, initial[0].shape[1] if initial[0].dim() == 3 else 0
    gates = {"alpha": alpha, "eta": eta, "theta": theta}
    check_chunk_start(q, k, v, gates, state, segment_ids, chunk, state_shape=(2 * hidden, dim))
    names = ("initial[0] (W1)", "initial[1] (W2)")
    check_initial(q, v, dict(zip(names, initial, strict=True)), (heads, hidden, dim))
    check_clip(clip)
    # Autocast would turn the sums to bfloat16 behind the float32 state.
    with torch.autocast(device_type=q.device.type, enabled=False):
        return _mlp_scan(q, k, v, alpha, eta, theta, initial, clip, state, segment_ids, chunk)


def kept_bytes(rows: int, sequence: int, dim: int, hidden: int, *, states: int, chunk: int, element: int = 4) -> int:
    """What a scan whose spans are not recomputed keeps, about; ``rows`` is batch x heads, ``element`` the bytes of its
    sums."""
    chunk = min(chunk, sequence)
    token = (6 + 2 * states) * dim + (20 + 4 * states) * hidden + 6 * chunk
    token += (2 + 2 * states) * 2 * hidden * dim // chunk
    return element * rows * sequence * token


def gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x Phi(x) and its derivative, Phi the normal distribution function."""
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _mlp_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    initial: tuple[Tensor, Tensor],
    clip: float | None,
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    chunk: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    dtype = sum_dtype(q)
    (batch, sequence, heads, dim), hidden = q.shape, initial[0].shape[1]
    rows, states = batch * heads, 1 if eta is None else 2
    keep, inside = boundaries(segment_ids, chunk, heads)
    # Per layer [N, J hidden, dim], side by side, so that one recurrence carries both.
    parts = [None, None] if state is None else list(zip(*(x.chunk(2, dim=-2) for x in state), strict=True))
    like, shape = q.new_empty(0, dtype=dtype), (batch, heads, hidden, dim)
    carry = torch.cat([stack_state(part, states, shape, like) for part in parts], dim=-1)
    first, second = (repeat(w.to(dtype), "heads hidden dim -> (batch heads) hidden dim", batch=batch) for w in initial)
    inputs = (q, k, v, 1 - alpha, eta, theta, keep, inside)
    kept = kept_bytes(rows, sequence, dim, hidden, states=states, chunk=chunk, element=dtype.itemsize)
    sizes = {"key_dim": dim, "value_dim": 2 * hidden, "states": states, "chunk": chunk}
    span = span_tokens(rows, **sizes, device_type=q.device.type)
    recompute = learns((*inputs, *initial, carry)) and kept > chunks.KEEP and sequence > span
    body = partial(_span, first=first, second=second, clip=clip, chunk=min(chunk, sequence))
    y, carry, update = scan_spans(body, inputs, carry, span=span, recompute=recompute)
    after = [
        unstack_state(
            part, None if update is None else update[..., index * dim : (index + 1) * dim], states, batch, heads
        )
        for index, part in enumerate(carry.split(dim, dim=-1))
    ]
    memory, momentum = (torch.cat(layers, dim=-2) for layers in zip(*after, strict=True))
    return y.to(v.dtype), (memory, momentum)


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retain: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    keep: Tensor | None,
    inside: Tensor | None,
    carry: Tensor,
    *,
    first: Tensor,
    second: Tensor,
    clip: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    (batch, length, heads, dim), hidden = q.shape, first.shape[-2]
    last = (length - 1) % chunk
    q, k, v, theta, retain = (to_chunks(x, chunk, carry.dtype) for x in (q, k, v, theta, retain))
    eta, keep, inside = (None if x is None else to_chunks(x, chunk, carry.dtype) for x in (eta, keep, inside))
    c = coefficients(retain, eta, theta, keep, last)
    own = [None] * len(k) if inside is None else (inside.unsqueeze(-1) > 0).unbind(0)
    starts, units, backs, errors = [], [], [], []
    # Unbound, not indexed: the gradient of an index is as large as what it is taken from.
    columns = (c.state_end.unbind(0), c.update_end.unbind(0), k.unbind(0), v.unbind(0), own)
    for end, weights, keys, values, in_segment in zip(*columns, strict=True):
        x, back, error = _gradients(keys, values, carry[:, :hidden], first, second, in_segment, clip)
        starts.append(carry)
        units.append(x)
        backs.append(back)
        errors.append(error)
        written = torch.cat([outer(weights, back).mT @ keys, outer(weights, x).mT @ error], dim=-1)
        carry = advance(end, carry) - written
    x, back, error = torch.stack(units), torch.stack(backs), torch.stack(errors)
    below, above = torch.stack(starts).split(dim, dim=-1)
    states = c.state.shape[-1]
    through = (q @ below.mT).unflatten(-1, (states, hidden))
    h, _ = gelu(q @ first.mT + (c.state.unsqueeze(-1) * through).sum(dim=-2) - ((q @ k.mT) * c.update) @ back)
    y = h @ second + outer(c.state, h) @ above - ((h @ x.mT) * c.update) @ error
    update = None
    if eta is None:
        step = -theta[-1, :, last, None, None]
        first_update = back[-1, :, last].unsqueeze(-1) * k[-1, :, last].unsqueeze(-2)
        second_update = x[-1, :, last].unsqueeze(-1) * error[-1, :, last].unsqueeze(-2)
        update = step * torch.cat([first_update, second_update], dim=-1)
    return from_chunks(y, batch, heads, length), carry, update


def _gradients(
    keys: Tensor,
    values: Tensor,
    state: Tensor,
    first: Tensor,
    second: Tensor,
    inside: Tensor | None,
    clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden units [N, C, hidden], and the factors B [N, C, hidden] and e [N, C, dim] of the chunk's gradients.

    state [N, hidden, 2 dim] is D of both layers; tokens that are not ``inside`` the segment of the chunk's start see
    the initial weights.
    """
    below, above = state.chunk(2, dim=-1)
    below, above = first + below, second + above

    def through(x: Tensor, now: Tensor, empty: Tensor) -> Tensor:
        return x @ now if inside is None else torch.where(inside, x @ now, x @ empty)

    x, slope = gelu(through(keys, below.mT, first.mT))
    error = through(x, above, second) - values
    back = through(error, above.mT, second.mT) * slope
    if clip is not None:
        squared = keys.square().sum(dim=-1, keepdim=True) * back.square().sum(dim=-1, keepdim=True)
        squared = squared + x.square().sum(dim=-1, keepdim=True) * error.square().sum(dim=-1, keepdim=True)
        factor = shrink(squared, clip)
        error, back = error * factor, back * factor
    return x, back, error
