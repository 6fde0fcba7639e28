"""The memory op in PyTorch: exact, chunked, for any device.

Notation, per head and chunk of C tokens: Q, K, V hold the chunk's rows, M and S are the state at its start,
a = 1 - alpha, and R holds the residuals r_t = k_t M_{t-1} - v_t. Unrolled within the chunk, the rule is linear in
M, S and R, with coefficients that the gates alone decide::

    L_a[t, j] = prod_{j < i <= t} a_i, L_eta alike    unit lower-triangular decay
    E = L_eta diag(theta), G = L_a E                  weight of -k_j^T r_j in S_t and in M_t
    beta_t = prod_{i <= t} a_i, f = L_a m             weight of M and of S in M_t
    m_t = prod_{i <= t} eta_i                         weight of S in S_t

A superscript minus (``before``) is the row of t - 1, the memory that token t finds: beta^-_0 = 1, f^-_0 = 0, G^-_0 = 0.
Then r_t depends on the residuals before it only, a unit-lower-triangular system, and the rest follows::

    (I + (K K^T) o G^-) R = beta^- K M + f^- K S - V
    O  = beta Q M + f Q S - ((Q K^T) o G) R
    M' = beta_C M + f_C S - (G_C K)^T R
    S' = m_C S - (E_C K)^T R

Solving for K and V first leaves R linear in the state, so that a loop over chunks holds three small products and all
else is batched over chunks. In the code n is the number of chunks, N = batch x heads, and J the states that are
carried: M and S (2), or M alone without momentum (1).
"""

from functools import partial
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.ops import chunks
from pipeline.ops.checks import sum_dtype
from pipeline.ops.chunks import (
    coefficients,
    from_chunks,
    learns,
    outer,
    same_document,
    scan_spans,
    span_tokens,
    stack_state,
    to_chunks,
    unstack_state,
)


def kept_bytes(
    rows: int, sequence: int, key_dim: int, value_dim: int, *, states: int, chunk: int, element: int = 4
) -> int:
    """What a scan whose spans are not recomputed keeps; ``rows`` is batch x heads, ``element`` the bytes of its sums.

    Per row and token: q, k, v and the residuals, four times J rows of a key, the states at the chunk's start, and
    the chunk's square matrices: five and two for every state.
    """
    chunk = min(chunk, sequence)
    square = states * key_dim * value_dim // chunk + (5 + 2 * states) * chunk
    return element * rows * sequence * ((2 + 4 * states) * key_dim + 2 * value_dim + square + 8 * states)


def recomputes(
    rows: int, sequence: int, key_dim: int, value_dim: int, *, states: int, chunk: int, span: int, element: int = 4
) -> bool:
    """Whether the spans of a call are recomputed in the backward pass, rather than kept."""
    size = kept_bytes(rows, sequence, key_dim, value_dim, states=states, chunk=chunk, element=element)
    return sequence > span and size > chunks.KEEP


def scan_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    *,
    state: tuple[Tensor, Tensor] | None,
    segment_ids: Tensor | None,
    chunk: int,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``miras_scan`` for arguments that it has checked; ``eta`` None is the rule without momentum."""
    dtype = sum_dtype(q)
    (batch, sequence, heads, key_dim), value_dim = k.shape, v.shape[-1]
    rows, states = batch * heads, 1 if eta is None else 2
    chunk = min(chunk, sequence)
    keep = None
    if segment_ids is not None:
        keep = repeat(same_document(segment_ids), "batch sequence -> batch sequence heads", heads=heads)

    sizes = {"key_dim": key_dim, "value_dim": value_dim, "states": states, "chunk": chunk}
    carry = stack_state(state, states, (batch, heads, key_dim, value_dim), q.new_empty(0, dtype=dtype))
    inputs = (q, k, v, 1 - alpha, eta, theta, keep)
    span = span_tokens(rows, **sizes, device_type=q.device.type)
    recompute = learns((*inputs, carry)) and recomputes(rows, sequence, **sizes, span=span, element=dtype.itemsize)
    y, carry, update = scan_spans(partial(_span, chunk=chunk), inputs, carry, span=span, recompute=recompute)
    return y.to(v.dtype), unstack_state(carry, update, states, batch, heads)


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retain: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    keep: Tensor | None,
    carry: Tensor,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scan tokens that are batched together, from the states ``carry`` [N, J key dim, value dim].

    Returns y, the states after the last token, and without momentum the last update, [N, key dim, value dim].
    """
    batch, sequence, heads, _ = q.shape
    last = (sequence - 1) % chunk
    q, k, v, theta, retain = (to_chunks(x, chunk, carry.dtype) for x in (q, k, v, theta, retain))
    eta = None if eta is None else to_chunks(eta, chunk, carry.dtype)
    keep = None if keep is None else to_chunks(keep, chunk, carry.dtype)
    c = coefficients(retain, eta, theta, keep, last)

    inverse = _UnitLowerInverse.apply((k @ k.mT) * c.update_before)
    from_state = inverse @ outer(c.state_before, k)
    from_values = inverse @ v
    starts, residuals, carry = _Recurrence.apply(c.state_end, from_state, from_values, outer(c.update_end, k), carry)

    y = outer(c.state, q) @ starts - ((q @ k.mT) * c.update) @ residuals
    update = None
    if eta is None:
        update = -(theta[-1, :, last, None] * k[-1, :, last]).unsqueeze(-1) * residuals[-1, :, last].unsqueeze(-2)
    return from_chunks(y, batch, heads, sequence), carry, update


class _UnitLowerInverse(torch.autograd.Function):
    """(I + T)^-1 of strictly lower T [..., C, C]. A product with it costs a tenth of a batched triangular solve."""

    @staticmethod
    def forward(ctx: Any, strictly_lower: Tensor) -> Tensor:
        size = strictly_lower.shape[-1]
        eye = torch.eye(size, dtype=strictly_lower.dtype, device=strictly_lower.device).expand_as(strictly_lower)
        inverse = torch.linalg.solve_triangular(strictly_lower, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ (grad @ inverse.mT))


class _Recurrence(torch.autograd.Function):
    """The states X [N, J D, Dv] at every chunk's start, and the residuals R, from those before the first chunk.

    R = from_state X - from_values, then X' = (state_end (x) I) X - update_keys^T R. Written out because its backward
    pass then loops over two products a chunk, and sums the gradients of all chunks' operands at once.
    """

    @staticmethod
    def forward(
        ctx: Any, state_end: Tensor, from_state: Tensor, from_values: Tensor, update_keys: Tensor, carry: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, _, states, _ = state_end.shape
        x = carry.new_empty(n + 1, *carry.shape)
        x[0] = carry
        stacked = x.unflatten(-2, (states, -1)).flatten(-2)
        residuals = torch.empty_like(from_values)
        for i in range(n):
            torch.baddbmm(from_values[i], from_state[i], x[i], beta=-1, out=residuals[i])
            torch.bmm(state_end[i], stacked[i], out=stacked[i + 1])
            x[i + 1].baddbmm_(update_keys[i].mT, residuals[i], alpha=-1)
        ctx.save_for_backward(state_end, from_state, update_keys, x, residuals)
        return x[:-1], residuals, x[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_starts: Tensor, grad_residuals: Tensor, grad_final: Tensor) -> tuple[Tensor, ...]:
        state_end, from_state, update_keys, x, residuals = ctx.saved_tensors
        n, _, states, _ = state_end.shape

        def by_state(y: Tensor) -> Tensor:
            return y.unflatten(-2, (states, -1)).flatten(-2)

        dx = torch.empty_like(x)
        dx[-1] = grad_final
        dr = torch.empty_like(residuals)
        stacked, grad_stacked = by_state(dx), by_state(grad_starts)
        for i in reversed(range(n)):
            torch.baddbmm(grad_residuals[i], update_keys[i], dx[i + 1], alpha=-1, out=dr[i])
            torch.baddbmm(grad_stacked[i], state_end[i].mT, stacked[i + 1], out=stacked[i])
            dx[i].baddbmm_(from_state[i].mT, dr[i])
        starts, after = x[:-1], dx[1:]
        return by_state(after) @ by_state(starts).mT, dr @ starts.mT, -dr, -(residuals @ after.mT), dx[0]
