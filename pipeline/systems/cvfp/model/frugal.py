"""Applications of blocks in training that keep less for the backward pass than PyTorch's own operations do.

Of each block the sums of both streams before its norms are kept, and a byte for each rectified number. The norms are
computed again in the backward pass: element by element, which takes little time beside the matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.systems.cvfp.model.block import Block

Norms = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Weight and bias of the context's norm, then of the token's; None where what enters has been normed."""


def applied(blocks: Sequence[Block], context: Tensor, token: Tensor, *, last_token: bool) -> tuple[Tensor, Tensor]:
    """Both streams [..., D] after all blocks, as `Block.forward` computes them; without `last_token` the last block
    leaves the sum of the token stream out, and the second tensor has no numbers."""
    shape, width = context.shape, context.shape[-1]
    sums = context.reshape(-1, width), token.reshape(-1, width)
    norms: Norms = (None, None, None, None)
    for block in blocks:
        wanted = last_token or block is not blocks[-1]
        norm, linear = block.norm_context, block.linear
        numbers = (block.decay, block.mix, norm.eps, wanted)
        sums = _Layer.apply(*sums, *norms, linear.weight, linear.bias, numbers)
        norms = (norm.weight, norm.bias, block.norm_token.weight, block.norm_token.bias)
    last, (of_context, of_token) = blocks[-1], sums
    context = last.mixed(of_context, last.norm_context).view(shape)
    return context, last.mixed(of_token, last.norm_token).view(shape) if last_token else of_token


def _normed(total: Tensor, weight: Tensor | None, bias: Tensor | None, mix: float, eps: float) -> Tensor:
    if weight is None:
        return total
    normed = torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return normed if mix == 1 else torch.lerp(total, normed, mix)


class _Layer(torch.autograd.Function):
    """The norms of the block before and the linear layer of this one, from sums to sums [tokens, D]."""

    @staticmethod
    def forward(
        ctx: Any, context: Tensor, token: Tensor, norm_context: Tensor | None, bias_context: Tensor | None,
        norm_token: Tensor | None, bias_token: Tensor | None, weight: Tensor, bias: Tensor,
        numbers: tuple[float, float, float, bool],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        decay, mix, eps, token_wanted = numbers
        width = context.shape[-1]
        old = _normed(context, norm_context, bias_context, mix, eps)
        state = _normed(token, norm_token, bias_token, mix, eps)
        rows = 2 * width if token_wanted else width
        of_context, of_token = weight[:rows].split(width, dim=1)
        added = torch.addmm(bias[:rows], old, of_context.T).addmm_(state, of_token.T).relu_()
        ctx.numbers = numbers
        ctx.save_for_backward(context, token, norm_context, bias_context, norm_token, bias_token, weight, added > 0)
        new = torch.add(added[:, :width], old, alpha=decay)
        return new, state + added[:, width:] if token_wanted else new.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_new: Tensor, of_sum: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, weight, positive = ctx.saved_tensors
        decay, mix, eps, token_wanted = ctx.numbers
        width, rows = of_new.shape[-1], positive.shape[-1]
        needed = ctx.needs_input_grad
        of_added = torch.cat([of_new, of_sum], dim=1) if token_wanted else of_new.clone()
        of_added.mul_(positive)
        del positive
        of_weight = of_bias = None
        if needed[6]:
            of_weight = torch.zeros_like(weight) if rows < len(weight) else torch.empty_like(weight)
        if needed[7]:
            of_bias = of_added.new_zeros(len(weight))
            of_bias[:rows] = of_added.sum(0)
        found: dict[int, Tensor] = {}
        # One stream after the other, since each takes as much again while it is worked on.
        for places, part, beside, factor in (
            ((0, 2, 3), slice(width), of_new, decay),
            ((1, 4, 5), slice(width, None), of_sum if token_wanted else None, 1.0),
        ):
            # Not the tensors themselves: their gradients are those of this function alone.
            leaves: list[Any] = [
                None if inputs[place] is None else inputs[place].detach().requires_grad_(needed[place])
                for place in places
            ]
            with torch.enable_grad():
                stream = _normed(leaves[0], leaves[1], leaves[2], mix, eps)
            if of_weight is not None:
                torch.mm(of_added.T, stream.detach(), out=of_weight[:rows, part])
            if stream.requires_grad:
                gradient = of_added @ weight[:rows, part]
                if beside is not None:
                    gradient.add_(beside, alpha=factor)
                if part.stop is None:
                    del of_added
                asked = {
                    place: leaf
                    for place, leaf in zip(places, leaves, strict=True)
                    if leaf is not None and leaf.requires_grad
                }
                gradients = torch.autograd.grad(stream, list(asked.values()), gradient)
                found.update(zip(asked, gradients, strict=True))
                del gradient, gradients
            del leaves, stream
        return (*(found.get(place) for place in range(len(inputs))), of_weight, of_bias, None)
