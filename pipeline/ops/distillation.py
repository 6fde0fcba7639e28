"""Kullback-Leibler divergence of two inputs of one linear head, without the logits of a whole sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.ops import cross_entropy


def linear_kl(hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """KL(teacher || student) in nats of every token: sum over v of p_v (ln p_v - ln q_v) with p = softmax(teacher W^T)
    and q = softmax(hidden W^T) (Hinton et al., arXiv 1503.02531, at temperature 1).

    hidden and teacher [tokens, width], weight [vocabulary, width] -> [tokens] float32 (float64 for float64).
    Differentiable in `hidden` alone. As in `linear_cross_entropy`, the gradient is made with each tile of logits, which
    is then dropped: no pass holds more than a tile of either's. Raises ValueError when `teacher` or `weight` require a
    gradient.
    """
    if teacher.requires_grad or weight.requires_grad:
        raise ValueError("linear_kl: the teacher and the head are constants: detach them, or freeze them")
    return _LinearKL.apply(hidden, teacher, weight)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Logits of both, in as many bytes as the cross-entropy has for one.
        tile = cross_entropy.tile_of(2 * weight.shape[0])
        divergence = torch.empty(hidden.shape[0], dtype=compute, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], tile):
            rows = slice(start, start + tile)
            logits, of_teacher = F.linear(hidden[rows], weight), F.linear(teacher[rows], weight)
            divergence[rows] = _divergences(logits, of_teacher, compute, with_gradient=gradient is not None)
            if gradient is not None:
                gradient[rows] = logits @ weight
        ctx.save_for_backward(gradient)
        ctx.tile = tile
        return divergence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        # Of a few tokens a scale is inf in float16, and of many it is rounded to a few bits: multiplied in float32.
        pieces = zip(gradient.split(ctx.tile), upstream.split(ctx.tile), strict=True)
        scaled = [(piece.to(scale.dtype) * scale.unsqueeze(1)).to(gradient.dtype) for piece, scale in pieces]
        return torch.cat(scaled) if scaled else gradient, None, None


def _divergences(logits: Tensor, of_teacher: Tensor, compute: torch.dtype, *, with_gradient: bool) -> Tensor:
    """Divergences [tokens] of two tiles of logits [tokens, vocabulary]; the gradient takes the place of `logits`."""
    block = len(logits)
    if logits.device.type == "cpu":
        # More than the cache holds would pass through memory once for every operation.
        block = max(1, cross_entropy.CACHED_BYTES * torch.get_num_threads() // (8 * logits.shape[1]))
    found = []
    for student, teacher in zip(logits.split(block), of_teacher.split(block), strict=True):
        student_log, teacher_log = (part.to(compute).log_softmax(dim=-1) for part in (student, teacher))
        expected = teacher_log.exp()
        # In place: `teacher_log` is the pointwise difference from here on.
        found.append(torch.linalg.vecdot(expected, teacher_log.sub_(student_log)))
        if with_gradient:
            # d KL / d logits is q - p.
            student.copy_(student_log.exp_().sub_(expected))
    return torch.cat(found)
