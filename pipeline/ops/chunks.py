"""What the chunked scans share: spans of tokens, chunks of a span, what the gates decide in a chunk, and the states.

In the code n is the number of chunks, N = batch x heads, C the chunk's tokens, and J the states that are carried: the
memory and its momentum (2), or the memory alone without momentum (1). ``scan_torch`` derives the coefficients; between
two gradients, the exact scan and the chunk-start scans differ in nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Elements of the largest temporary, which sets how many chunks are batched. On a CPU one of 8 MB is reused from the
# allocator's pool, while one over 32 MB faults in every page anew, at twice the total cost; a GPU wants to be filled.
SPAN_CPU = 2**21
SPAN_GPU = 2**27

# Bytes that a call may keep for the backward pass. Beyond them every span is recomputed there: one more forward pass of
# the scan, for a few per cent of the memory. What fits a laptop stays below and is as fast as it can be.
KEEP = 2**30

Body = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""(*the span's tokens, carry) -> y [batch, span, heads, dim], the carry after it, and the last token's update or
None."""


class Coefficients(NamedTuple):
    """What the gates decide in each chunk."""

    update: Tensor  # [n, N, C, C]  G: of update j in the memory that token t reads
    update_before: Tensor  # [n, N, C, C]  G^-: of update j in the memory that token t finds
    state: Tensor  # [n, N, C, J]  beta, f: of the carried states in the memory that token t reads
    state_before: Tensor  # [n, N, C, J]  beta^-, f^-
    update_end: Tensor  # [n, N, C, J]  G_C, E_C: of update j in the states after the chunk
    state_end: Tensor  # [n, N, J, J]  of the carried states in the states after the chunk


def span_tokens(rows: int, key_dim: int, value_dim: int, *, states: int, chunk: int, device_type: str) -> int:
    """Tokens that are batched together, a multiple of the chunk; ``rows`` is batch x heads."""
    elements = rows * max(chunk * chunk, chunk * states * key_dim, states * key_dim * value_dim)
    return chunk * max(1, (SPAN_CPU if device_type == "cpu" else SPAN_GPU) // elements)


def learns(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call with these tensors has a backward pass."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def scan_spans(
    body: Body, tokens: Sequence[Tensor | None], carry: Tensor, *, span: int, recompute: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs ``body`` on spans of tokens [batch, sequence, ...] one after another; with ``recompute``, keeps their
    inputs alone: parts of the tokens, and the states at every span's start."""
    # split, not slices: the gradient of a slice is as long as the whole sequence, and there is one per span.
    columns: list[Sequence[Any]] = []
    length = next(x.shape[1] for x in tokens if x is not None)
    for x in tokens:
        columns.append([None] * -(-length // span) if x is None else x.split(span, dim=1))
    outputs = []
    update = None
    for part in zip(*columns, strict=True):
        if recompute:
            y, carry, update = checkpoint(body, *part, carry, use_reentrant=False, preserve_rng_state=False)
        else:
            y, carry, update = body(*part, carry)
        outputs.append(y)
    return torch.cat(outputs, dim=1), carry, update


def same_document(segment_ids: Tensor) -> Tensor:
    """[batch, sequence] bool: the token is of the same segment as the one before.

    The first token of all goes on with the given state.
    """
    return F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=True)


def boundaries(segment_ids: Tensor | None, chunk: int, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """(keep, inside), each [batch, sequence, heads], bool; (None, None) without segments.

    keep: the token is of the same segment as the one before. inside: it is of the segment that its chunk found, so the
    memory at the chunk's start is its own.
    """
    if segment_ids is None:
        return None, None
    same = same_document(segment_ids)
    length = same.shape[1]
    padded = F.pad(same, (0, -length % chunk), value=True)
    chunks = rearrange(padded, "batch (chunks tokens) -> batch chunks tokens", tokens=chunk)
    inside = rearrange(chunks.int().cumprod(dim=-1).bool(), "batch chunks tokens -> batch (chunks tokens)")[:, :length]
    keep, inside = (repeat(x, "batch sequence -> batch sequence heads", heads=heads) for x in (same, inside))
    return keep, inside


def to_chunks(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """[batch, sequence, heads, ...] to [n, N, C, ...]: the chunks first, so that a loop over them sees whole blocks.

    The ragged end is filled with zeros: a token without key, value or step size, which changes no other token.
    """
    ragged = -x.shape[1] % chunk
    x = x.to(dtype)
    if ragged:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, ragged))
    # Contiguous: of a view, which a batch of one stays, every product would make and keep a copy of its own.
    return rearrange(x, "batch (chunks tokens) heads ... -> chunks (batch heads) tokens ...", tokens=chunk).contiguous()


def from_chunks(y: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """[n, N, C, D] to [batch, length, heads, D]: the inverse of `to_chunks`, padding left out."""
    y = rearrange(y, "chunks (batch heads) tokens dim -> batch (chunks tokens) heads dim", batch=batch, heads=heads)
    return y[:, :length]


def outer(weights: Tensor, rows: Tensor) -> Tensor:
    """[..., C, J] weights on [..., C, D] rows, side by side as [..., C, J D]: what multiplies the stacked states."""
    return (weights.unsqueeze(-1) * rows.unsqueeze(-2)).flatten(-2)


def coefficients(retain: Tensor, eta: Tensor | None, theta: Tensor, keep: Tensor | None, last: int) -> Coefficients:
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


def advance(state_end: Tensor, carry: Tensor) -> Tensor:
    """The carried states [N, J R, D] after a chunk that writes nothing; state_end [N, J, J]."""
    states = state_end.shape[-1]
    if states == 1:
        return state_end * carry
    rows = carry.shape[-2] // states
    return (state_end @ carry.unflatten(-2, (states, rows)).flatten(-2)).unflatten(-1, (rows, -1)).flatten(1, 2)


def stack_state(state: tuple[Tensor, Tensor] | None, states: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """(M, S), each [batch, heads, R, D], as a carry [N, J R, D]; zeros when None. ``shape`` is [batch, heads, R, D]."""
    batch, heads, rows, dim = shape
    if state is None:
        return like.new_zeros(batch * heads, states * rows, dim)
    return rearrange(torch.cat(state[:states], dim=-2), "batch heads rows dim -> (batch heads) rows dim")


def unstack_state(carry: Tensor, update: Tensor | None, states: int, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """The state (M, S) of a carry; without momentum, S is the last update [N, R, D]."""
    # Copies: a carry that is kept or saved should not hold on to a larger tensor.
    parts = [x.clone(memory_format=torch.contiguous_format) for x in carry.chunk(states, dim=-2)]
    if states == 1:
        assert update is not None
        parts.append(update)
    memory, momentum = (x.unflatten(0, (batch, heads)) for x in parts)
    return memory, momentum
