"""What the chunk-start scans share: spans of tokens, chunks of a span, and the recurrence of their states.

In the code n is the number of chunks, N = batch x heads, C the chunk's tokens, and J the states that are carried: the
memory and its momentum (2), or the memory alone (1). The coefficients are those of the exact scan (``scan_torch``):
between two gradients, the rules differ in nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Bytes that a call may keep for the backward pass. Beyond them every span is recomputed there.
KEEP = 2**30

Body = Callable[..., tuple[Tensor, Tensor, Tensor | None]]
"""(*the span's tokens, carry) -> y [batch, span, heads, dim], the carry after it, and the last token's update or
None."""


def boundaries(segment_ids: Tensor | None, chunk: int, shape: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
    """(keep, inside), each ``shape`` = [batch, sequence, heads], bool; (None, None) without segments.

    keep: the token is of the same segment as the one before. inside: it is of the segment that its chunk found, so the
    memory at the chunk's start is its own. The first token of all goes on with the given state.
    """
    if segment_ids is None:
        return None, None
    same = F.pad(segment_ids[:, 1:] == segment_ids[:, :-1], (1, 0), value=True)
    length = same.shape[1]
    chunks = F.pad(same, (0, -length % chunk), value=True).unflatten(1, (-1, chunk))
    inside = chunks.int().cumprod(dim=-1).bool().flatten(1)[:, :length]
    return same.unsqueeze(-1).expand(*shape), inside.unsqueeze(-1).expand(*shape)


def scan_spans(
    body: Body, tokens: Sequence[Tensor | None], carry: Tensor, *, span: int, recompute: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Runs ``body`` on spans of tokens [batch, sequence, ...] one after another; with ``recompute``, keeps their
    inputs alone."""
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
    return torch.cat(state[:states], dim=-2).reshape(batch * heads, states * rows, dim)


def unstack_state(carry: Tensor, update: Tensor | None, states: int, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """The state (M, S) of a carry; without momentum, S is the last update [N, R, D]."""
    # Copies: a carry that is kept or saved should not hold on to a larger tensor.
    parts = [x.clone(memory_format=torch.contiguous_format) for x in carry.chunk(states, dim=-2)]
    if states == 1:
        assert update is not None
        parts.append(update)
    memory, momentum = (x.unflatten(0, (batch, heads)) for x in parts)
    return memory, momentum


def unchunk(y: Tensor, batch: int, heads: int, length: int) -> Tensor:
    """[n, N, C, D] to [batch, length, heads, D]: the inverse of ``scan_torch._chunks``, padding left out."""
    return y.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]
