"""Cross-entropy of a linear head by tiles of tokens.

A tile has LOGIT_BYTES // (4 vocabulary) tokens, at least one: 1,334 of 50,304 ids. So at most LOGIT_BYTES of float32
logits exist at a time, or those of one token, whatever the number of tokens; fewer tokens than a tile are one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops.fuse import fused

LOGIT_BYTES = 256 * 2**20
"""Bytes of a tile's logits in float32."""
CACHED_BYTES = 2**20
"""Bytes of float32 logits that a thread of a CPU takes through the softmax at a time: what its cache holds."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int = -100, bias: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood in nats of every label, 0 where the label is `ignored`.

    hidden [tokens, width], weight [vocabulary, width], labels [tokens] int64, bias [vocabulary] if the head has one ->
    [tokens] float32 (float64 for float64).
    The gradients of all are made with each tile of logits, which is then dropped: nothing is recomputed in the
    backward pass, so the matrix products are those of a head that keeps its logits.
    That pass takes ONE scale for all counted tokens (the sum is what a loss is made of); per-token weights are refused.
    """
    return _apply(hidden, weight, labels, ignored, 0.0, bias)[0]


def linear_cross_entropy_z(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    z_loss: float,
    ignored: int = -100,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `linear_cross_entropy`, and the z-loss of every label [tokens]: z_loss times the square of its logits'
    log-sum-exp, 0 where the label is `ignored` (Chowdhery et al., PaLM, arXiv 2204.02311, section 5).

    The backward pass takes one scale for all counted tokens of both.
    """
    losses, penalties = _apply(hidden, weight, labels, ignored, z_loss, bias)
    assert penalties is not None
    return losses, penalties


def _apply(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignored: int, z_loss: float, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if not torch.is_grad_enabled():
        # A function is told of gradients that its inputs could have, wanted or not.
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    found: tuple[Tensor, Tensor | None] = _LinearCrossEntropy.apply(hidden, weight, labels, ignored, z_loss, bias)
    return found


@torch.no_grad()
def linear_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The likeliest id at every token [tokens] int64, tile by tile."""
    tile = tile_of(weight.shape[0])
    return torch.cat([F.linear(piece, weight, bias).argmax(dim=-1) for piece in hidden.split(tile)])


def tile_of(vocabulary: int) -> int:
    """Tokens whose logits exist at a time."""
    return max(1, LOGIT_BYTES // (4 * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignored: int,
        z_loss: float,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        need_hidden, need_weight, *_, need_bias = ctx.needs_input_grad
        learns = need_hidden or need_weight or need_bias
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        tile = tile_of(weight.shape[0])
        losses = torch.empty(hidden.shape[0], dtype=compute, device=hidden.device)
        penalties = torch.empty_like(losses) if z_loss else None
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=compute) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=compute) if bias is not None and need_bias else None
        for start in range(0, hidden.shape[0], tile):
            rows = slice(start, start + tile)
            piece, target = hidden[rows], labels[rows]
            # An evaluation may read text without asking for anything. On a device the answer would be waited for.
            if not learns and hidden.device.type == "cpu" and not (target != ignored).any():
                losses[rows] = 0
                if penalties is not None:
                    penalties[rows] = 0
                continue
            logits = F.linear(piece, weight, bias)
            if not learns:
                wide = logits.to(compute)
                losses[rows] = _losses(wide, target, ignored)
                if penalties is not None:
                    penalties[rows] = z_loss * wide.logsumexp(dim=-1).square() * (target != ignored)
                continue
            losses[rows], squares, gradient = _losses_and_gradient(logits, target, ignored, z_loss)
            if penalties is not None and squares is not None:
                penalties[rows] = squares
            del logits
            if grad_hidden is not None:
                grad_hidden[rows] = gradient @ weight
            if grad_weight is not None:
                # In float32, whatever a tile's part of it is made in.
                grad_weight += gradient.T @ piece
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0, dtype=compute)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype, ctx.tile = weight.dtype, tile
        ctx.bias_dtype = None if bias is None else bias.dtype
        return losses, penalties

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, of_penalties: Tensor | None) -> tuple[Any, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = upstream.flatten()[0] if upstream.numel() else upstream.new_zeros(())
        if upstream.stride() != (0,) and not torch.equal(upstream, scale.expand_as(upstream)):
            raise ValueError("linear_cross_entropy: the gradient differs between tokens: sum the losses before scaling")
        if of_penalties is not None:
            same = (of_penalties == scale).all()
            if same.is_cuda:
                torch._assert_async(same)  # without waiting for the device
            elif not same:
                raise ValueError("linear_cross_entropy_z: losses and z-losses have other gradients: add up their sums")
        hidden: Tensor | None = None
        if grad_hidden is not None and grad_hidden.dtype == torch.float16:
            # A scale over a few tokens is inf in float16, one over many is rounded to a few bits.
            pieces = grad_hidden.split(ctx.tile)
            hidden = torch.cat([(piece.to(scale.dtype) * scale).to(grad_hidden.dtype) for piece in pieces])
        elif grad_hidden is not None:
            hidden = grad_hidden * scale
        weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        bias = None if grad_bias is None else (grad_bias * scale).to(ctx.bias_dtype)
        return hidden, weight, None, None, None, bias


def _losses(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")


def _losses_and_gradient(
    logits: Tensor, labels: Tensor, ignored: int, z_loss: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Losses [tokens] of a tile of logits [tokens, vocabulary], z-losses alike where there are any, and the gradient of
    their sum, like the logits, whose memory it may take."""
    if logits.is_cuda:
        return fused(softmax_and_gradient, dynamic=True)(logits, labels, ignored, z_loss)
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = torch.empty(logits.shape[0], dtype=compute, device=logits.device)
    penalties = torch.empty_like(losses) if z_loss else None
    # More than the cache holds would pass through memory once for every operation.
    block = max(1, CACHED_BYTES * torch.get_num_threads() // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], block):
        rows = slice(start, start + block)
        wide, target = logits[rows].to(compute), labels[rows]
        losses[rows] = _losses(wide, target, ignored)
        gradient = wide.softmax(dim=-1)
        if penalties is not None:
            total = wide.logsumexp(dim=-1)
            penalties[rows] = z_loss * total.square() * (target != ignored)
            gradient *= (1 + 2 * z_loss * total).unsqueeze(1)
        one = torch.full_like(target, -1, dtype=compute).unsqueeze(1)
        gradient.scatter_add_(1, target.clamp_min(0).unsqueeze(1), one)
        gradient *= (target != ignored).unsqueeze(1)
        logits[rows] = gradient
    return losses, penalties, logits


def softmax_and_gradient(
    logits: Tensor, labels: Tensor, ignored: int, z_loss: float = 0.0
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `_losses_and_gradient`, in operations that torch.compile makes two passes over the logits of."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted, place = labels != ignored, labels.clamp_min(0).unsqueeze(1)
    total = wide.logsumexp(dim=-1, keepdim=True)
    losses = torch.where(counted, (total - wide.gather(1, place)).squeeze(1), 0.0)
    at_label = torch.arange(logits.shape[1], device=logits.device) == place
    share, penalties = (wide - total).exp(), None
    if z_loss:
        share = share * (1 + 2 * z_loss * total)
        penalties = z_loss * total.square().squeeze(1) * counted
    gradient = (share - at_label.to(wide.dtype)) * counted.unsqueeze(1)
    return losses, penalties, gradient.to(logits.dtype)
