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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Elements of the largest temporary, which sets how many chunks are batched. On a CPU one of 8 MB is reused from the
# allocator's pool, while one over 32 MB faults in every page anew, at twice the total cost; a GPU wants to be filled.
_SPAN_CPU = 2**21
_SPAN_GPU = 2**27

# Bytes that a call may keep for the backward pass. Beyond them every span is recomputed there: one more forward pass of
# the scan, for a few per cent of the memory. What fits a laptop stays below and is as fast as it can be.
_KEEP = 2**30


class Coefficients(NamedTuple):
    """What the gates decide in each chunk."""

    update: Tensor  # [n, N, C, C]  G: of update j in the memory that token t reads
    update_before: Tensor  # [n, N, C, C]  G^-: of update j in the memory that token t finds
    state: Tensor  # [n, N, C, J]  beta, f: of the carried states in the memory that token t reads
    state_before: Tensor  # [n, N, C, J]  beta^-, f^-
    update_end: Tensor  # [n, N, C, J]  G_C, E_C: of update j in the states after the chunk
    state_end: Tensor  # [n, N, J, J]  of the carried states in the states after the chunk


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


def span_tokens(rows: int, key_dim: int, value_dim: int, *, states: int, chunk: int, device_type: str) -> int:
    """Tokens that are batched together, a multiple of the chunk; ``rows`` is batch x heads."""
    elements = rows * max(chunk * chunk, chunk * states * key_dim, states * key_dim * value_dim)
    return chunk * max(1, (_SPAN_CPU if device_type == "cpu" else _SPAN_GPU) // elements)


def recomputes(
    rows: int, sequence: int, key_dim: int, value_dim: int, *, states: int, chunk: int, span: int, element: int = 4
) -> bool:
    """Whether the spans of a call are recomputed in the backward pass, rather than kept."""
    size = kept_bytes(rows, sequence, key_dim, value_dim, states=states, chunk=chunk, element=element)
    return sequence > span and size > _KEEP


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
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, sequence, heads, key_dim = k.shape
    states = 1 if eta is None else 2
    chunk = min(chunk, sequence)

    keep = None
    if segment_ids is not None:
        same = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=True)
        keep = same.unsqueeze(-1).expand(batch, sequence, heads)

    shape = (batch * heads, states * key_dim, v.shape[-1])
    carry = k.new_zeros(shape, dtype=dtype) if state is None else torch.cat(state[:states], dim=-2).reshape(shape)
    rows, value_dim = batch * heads, v.shape[-1]
    span = span_tokens(rows, key_dim, value_dim, states=states, chunk=chunk, device_type=q.device.type)
    # split, not slices: the gradient of a slice is as long as the whole sequence, and there is one per span.
    inputs = (q, k, v, 1 - alpha, eta, theta, keep)
    columns: list[Sequence[Any]] = [
        [None] * -(-sequence // span) if x is None else x.split(span, dim=1) for x in inputs
    ]
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, carry))
    again = learns and recomputes(
        rows, sequence, key_dim, value_dim, states=states, chunk=chunk, span=span, element=dtype.itemsize
    )
    outputs = []
    last_update = None
    for part in zip(*columns, strict=True):
        arguments = (*part, carry, chunk)
        if again:
            # What survives is the arguments: parts of q, k, v and the gates, and the states at the span's start.
            y, carry, last_update = checkpoint(_span, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            y, carry, last_update = _span(*arguments)
        outputs.append(y)
    y = torch.cat(outputs, dim=1).to(v.dtype)

    # Copies: a carry that is kept or saved should not hold on to a larger tensor.
    final = [x.clone(memory_format=torch.contiguous_format) for x in carry.chunk(states, dim=-2)]
    if last_update is not None:
        final.append(last_update)
    memory, momentum = (x.unflatten(0, (batch, heads)) for x in final)
    return y, (memory, momentum)


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retain: Tensor,
    eta: Tensor | None,
    theta: Tensor,
    keep: Tensor | None,
    carry: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scan tokens that are batched together, from the states ``carry`` [N, J key dim, value dim].

    Returns y, the states after the last token, and without momentum the last update, [N, key dim, value dim].
    """
    batch, sequence, heads, _ = q.shape
    last = (sequence - 1) % chunk
    q, k, v, theta, retain = (_chunks(x, chunk, carry.dtype) for x in (q, k, v, theta, retain))
    eta = None if eta is None else _chunks(eta, chunk, carry.dtype)
    keep = None if keep is None else _chunks(keep, chunk, carry.dtype)
    c = _coefficients(retain, eta, theta, keep, last)

    inverse = _UnitLowerInverse.apply((k @ k.mT) * c.update_before)
    from_state = inverse @ _outer(c.state_before, k)
    from_values = inverse @ v
    starts, residuals, carry = _Recurrence.apply(c.state_end, from_state, from_values, _outer(c.update_end, k), carry)

    y = _outer(c.state, q) @ starts - ((q @ k.mT) * c.update) @ residuals
    y = y.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :sequence]
    last_update = None
    if eta is None:
        last_update = -(theta[-1, :, last, None] * k[-1, :, last]).unsqueeze(-1) * residuals[-1, :, last].unsqueeze(-2)
    return y, carry, last_update


def _chunks(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """[batch, sequence, heads, ...] to [n, N, C, ...]: the chunks first, so that a loop over them sees whole blocks.

    The ragged end is filled with zeros: a token without key, value or step size, which changes no other token.
    """
    ragged = -x.shape[1] % chunk
    x = x.to(dtype)
    if ragged:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, ragged))
    # Contiguous: of a view, which a batch of one stays, every product would make and keep a copy of its own.
    return x.unflatten(1, (-1, chunk)).movedim(3, 2).movedim(1, 0).flatten(1, 2).contiguous()


def _outer(weights: Tensor, rows: Tensor) -> Tensor:
    """[..., C, J] weights on [..., C, D] rows, side by side as [..., C, J D]: what multiplies the stacked states."""
    return (weights.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)


def _coefficients(retain: Tensor, eta: Tensor | None, theta: Tensor, keep: Tensor | None, last: int) -> Coefficients:
    """Coefficients from the gates, each [n, N, C]. ``last`` is the place of the last real token in the last chunk."""
    if keep is not None:
        # A token that starts a segment cuts every product that runs through it, and finds an empty memory (below).
        retain = retain * keep
    decay = _Decay.apply(retain)
    memory = decay[..., 0] * retain[..., :1]

    if eta is None:
        update = decay * theta.unsqueeze(-2)
        state = memory.unsqueeze(-1)
        state_before = F.pad(memory[..., :-1], (1, 0), value=1.0).unsqueeze(-1)
        update_end = _end(update, last).unsqueeze(-1)
        state_end = _end(memory, last)[..., None, None]
    else:
        if keep is not None:
            eta = eta * keep
        momentum_decay = _Decay.apply(eta)
        momentum = momentum_decay[..., 0] * eta[..., :1]
        momentum_update = momentum_decay * theta.unsqueeze(-2)
        update = decay @ momentum_update
        momentum_in_memory = (decay @ momentum.unsqueeze(-1)).squeeze(-1)
        state = torch.stack([memory, momentum_in_memory], dim=-1)
        state_before = torch.stack(
            [F.pad(memory[..., :-1], (1, 0), value=1.0), F.pad(momentum_in_memory[..., :-1], (1, 0))], dim=-1
        )
        update_end = torch.stack([_end(update, last), _end(momentum_update, last)], dim=-1)
        momentum_end = _end(momentum, last)
        state_end = torch.stack(
            [_end(memory, last), _end(momentum_in_memory, last), torch.zeros_like(momentum_end), momentum_end], dim=-1
        ).unflatten(-1, (2, 2))

    update_before = F.pad(update[..., :-1, :], (0, 0, 1, 0))
    if keep is not None:
        update_before = update_before * keep.unsqueeze(-1)
        state_before = state_before * keep.unsqueeze(-1)
    return Coefficients(update, update_before, state, state_before, update_end, state_end)


def _end(x: Tensor, last: int) -> Tensor:
    """The row of each chunk's last token; that of the last chunk comes before the padding, which would decay S."""
    if last == x.shape[2] - 1:
        return x[:, :, -1]
    return torch.cat([x[:-1, :, -1], x[-1:, :, last]])


class _Decay(torch.autograd.Function):
    """L[t, j] = prod_{j < i <= t} gate_i from gates [..., C]; without divisions, so that a gate may be exactly 0."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor) -> Tensor:
        size = gate.shape[-1]
        below = torch.ones(size, size, dtype=torch.bool, device=gate.device).tril(-1)
        decay = torch.where(below, gate.unsqueeze(-1), 1.0).cumprod(dim=-2).tril_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # dL[t, j] / dgate_i = L[t, i] L[i - 1, j] for j < i <= t, and L is zero elsewhere.
        (decay,) = ctx.saved_tensors
        later = decay.mT @ grad
        return F.pad((later[..., 1:, :] * decay[..., :-1, :]).sum(dim=-1), (1, 0))


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
