"""The elementwise affine scan in PyTorch: blocked, for any device.

Time is cut into n pieces of C tokens. Every piece is an affine map x -> P x + Q of the state before it, so three passes
do, all but the middle one batched over the pieces, in about 2 C + n steps with C and n near the root of the length:

    1. P and Q of every piece, token by token
    2. the state before every piece, piece by piece
    3. the states of all tokens, token by token, from there

Only products and sums: a may be zero. P is kept in float64, where it overflows only for a state that overflows in
float32, or that is zero and does not care.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def affine_scan_torch(a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """``affine_scan`` for arguments that it has checked: a, b ``[batch, sequence, features]``, state ``[batch,
    features]`` in the dtype of the sums, resets ``[batch, sequence]`` true where a segment starts."""
    h, after = _AffineScan.apply(a.to(state.dtype), b.to(state.dtype), state, resets)
    return h.to(b.dtype), after


class _AffineScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> tuple[Tensor, Tensor]:
        h = _scan(a, b, state, resets)
        ctx.save_for_backward(a, h, state, resets)
        return h, h[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor, grad_after: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # g_t = grad_h_t + a_{t+1} g_{t+1}, the same scan backwards in time; a_{t+1} is masked where t + 1 resets.
        a, h, state, resets = ctx.saved_tensors
        later = F.pad(a[:, 1:], (0, 0, 0, 1), value=1.0).flip(1)
        cuts = None if resets is None else F.pad(resets[:, 1:], (0, 1), value=False).flip(1)
        g = _scan(later, grad_h.flip(1), grad_after, cuts).flip(1)
        before = torch.cat([state.unsqueeze(1), h[:, :-1]], dim=1)
        grad_a, grad_state = g * before, a[:, 0] * g[:, 0]
        if resets is not None:
            grad_a = grad_a.masked_fill(resets.unsqueeze(-1), 0.0)
            grad_state = grad_state.masked_fill(resets[:, :1], 0.0)
        return grad_a, g, grad_state, None


def _scan(a: Tensor, b: Tensor, state: Tensor, resets: Tensor | None) -> Tensor:
    sequence = a.shape[1]
    piece = max(1, math.isqrt(sequence))
    n = sequence // piece
    whole = n * piece
    h = torch.empty_like(b, memory_format=torch.contiguous_format)

    def pieces(x: Tensor) -> Tensor:
        return x[:, :whole].unflatten(1, (n, piece))

    cut = None if resets is None else pieces(resets).unsqueeze(-1)
    starts = _starts(pieces(a), pieces(b), state, cut)
    last = _tokens(pieces(a), pieces(b), starts, cut, pieces(h))[:, -1]
    if whole < sequence:
        rest = slice(whole, None)
        cut = None if resets is None else resets[:, None, rest, None]
        _tokens(a[:, None, rest], b[:, None, rest], last.unsqueeze(1), cut, h[:, None, rest])
    return h


def _starts(a: Tensor, b: Tensor, state: Tensor, cut: Tensor | None) -> Tensor:
    """The state before every piece; a, b [batch, n, C, features], cut [batch, n, C, 1]."""
    n, piece = a.shape[1:3]
    starts = [state]
    if n > 1:
        product, end = a[:, :-1, 0].double(), b[:, :-1, 0]
        for t in range(1, piece):
            found = end if cut is None else end.masked_fill(cut[:, :-1, t], 0.0)
            product, end = product * a[:, :-1, t], torch.addcmul(b[:, :-1, t], a[:, :-1, t], found)
        severed = None if cut is None else cut.any(dim=2)
        for i in range(n - 1):
            x = starts[-1]
            alone = x == 0 if severed is None else (x == 0) | severed[:, i]
            joined = torch.addcmul(end[:, i].double(), product[:, i], x.double())
            starts.append(torch.where(alone, end[:, i], joined.to(x.dtype)))
    return torch.stack(starts, dim=1)


def _tokens(a: Tensor, b: Tensor, starts: Tensor, cut: Tensor | None, h: Tensor) -> Tensor:
    """Fill h [batch, n, C, features] from the states before the pieces; returns those after them."""
    x = starts
    for t in range(a.shape[2]):
        # Masked here rather than in a: an overflow of the segment before must not become 0 x inf.
        found = x if cut is None else x.masked_fill(cut[:, :, t], 0.0)
        x = torch.addcmul(b[:, :, t], a[:, :, t], found)
        h[:, :, t] = x
    return x
