"""Modules of all columns at once: activations are [B, N, P, features], and B columns are one batched product.

The initial values are not here: `weights.py` fills every parameter by its name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-5
UNIT_EPS = 1e-8


class ColumnLinear(nn.Module):
    """An affine map of its own for each column (or each layer of each column).

    weight [columns, inputs, outputs], bias [columns, outputs] if there is one. Source: `torch.nn.Linear`, batched.
    """

    def __init__(self, columns: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(columns, outputs)) if bias else None

    def forward(self, *parts: Tensor) -> Tensor:
        """x [columns, ..., inputs] -> [columns, ..., outputs], one product for all columns.

        x may be given in parts of some of its features each, which are then never put together: a product for each.
        """
        shape = parts[0].shape[:-1]
        flat = [x.reshape(x.shape[0], -1, x.shape[-1]) for x in parts]
        weights = self.weight.split([x.shape[-1] for x in parts], dim=1) if len(parts) > 1 else (self.weight,)
        out = None if self.bias is None else self.bias.unsqueeze(1)
        for x, weight in zip(flat, weights, strict=True):
            out = torch.bmm(x, weight) if out is None else torch.baddbmm(out, x, weight)
        assert out is not None
        return out.view(*shape, out.shape[-1])


class SharedColumnLinear(nn.Module):
    """An affine map for each column, all of the same input: one product with a matrix of B * outputs rows.

    weight [columns, outputs, inputs], bias [columns, outputs] if there is one.
    """

    def __init__(self, columns: int, inputs: int, outputs: int, *, bias: bool = True) -> None:
        super().__init__()
        self.columns = columns
        self.weight = nn.Parameter(torch.empty(columns, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(columns, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [columns, ..., outputs], contiguous."""
        out = F.linear(x, self.weight.flatten(0, 1), None if self.bias is None else self.bias.flatten())
        return rearrange(out, "... (columns outputs) -> columns ... outputs", columns=self.columns).contiguous()


class ColumnNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) with a gain and a bias of its own for each column, [columns, features]."""

    def __init__(self, columns: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns, features))
        self.bias = nn.Parameter(torch.empty(columns, features))

    def forward(self, x: Tensor) -> Tensor:
        """x [columns, ..., features] alike."""
        return _Norm.apply(x.flatten(1, -2), self.weight, self.bias).view(x.shape)


class ColumnFeedForward(nn.Module):
    """x + FFN(LN(x)) for each column: four times as wide inside, GELU.

    One module and not a norm and two maps, since ZeRO-3 gathers weights for the call of the module that has them.
    """

    def __init__(self, columns: int, features: int) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.empty(columns, features))
        self.norm_bias = nn.Parameter(torch.empty(columns, features))
        self.inner_weight = nn.Parameter(torch.empty(columns, features, 4 * features))
        self.inner_bias = nn.Parameter(torch.empty(columns, 4 * features))
        self.outer_weight = nn.Parameter(torch.empty(columns, 4 * features, features))
        self.outer_bias = nn.Parameter(torch.empty(columns, features))

    def forward(self, x: Tensor) -> Tensor:
        """x [columns, ..., features] alike."""
        weights = (self.norm_weight, self.norm_bias, self.inner_weight, self.inner_bias, self.outer_weight)
        return _FeedForward.apply(x.flatten(1, -2), *weights, self.outer_bias).view(x.shape)


class _Norm(torch.autograd.Function):
    """Keeps x alone: what autograd would keep besides is cheap to compute again. x [columns, rows, features]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return _affine(_normed(x)[0], gain, shift)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, gain = ctx.saved_tensors
        return _norm_backward(grad, x, gain, _normed(x))


class _FeedForward(torch.autograd.Function):
    """Keeps x and what the activation takes, 5 numbers of a feature in place of 11. x [columns, rows, features]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        gain, shift, w1, b1, w2, b2 = weights
        inner = torch.baddbmm(b1.unsqueeze(1), _affine(_normed(x)[0], gain, shift), w1)
        ctx.save_for_backward(x, inner, gain, shift, w1, w2)
        return torch.baddbmm(b2.unsqueeze(1), F.gelu(inner), w2).add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, inner, gain, shift, w1, w2 = ctx.saved_tensors
        grad_w2 = torch.bmm(F.gelu(inner).transpose(1, 2), grad)
        grad_inner = torch.ops.aten.gelu_backward(torch.bmm(grad, w2.transpose(1, 2)), inner)
        norm = _normed(x)
        grad_w1 = torch.bmm(_affine(norm[0], gain, shift).transpose(1, 2), grad_inner)
        through, *of_norm = _norm_backward(torch.bmm(grad_inner, w1.transpose(1, 2)), x, gain, norm)
        return (through.add_(grad), *of_norm, grad_w1, grad_inner.sum(1), grad_w2, grad.sum(1))


def _normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x normed, its means, and the reciprocals of its standard deviations."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, NORM_EPS)


def _affine(normed: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift.unsqueeze(1), normed, gain.unsqueeze(1))


def _norm_backward(
    grad: Tensor, x: Tensor, gain: Tensor, norm: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gain and shift."""
    normed, mean, scale = norm
    through, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad * gain.unsqueeze(1), x, x.shape[-1:], mean, scale, None, None, [True, False, False]
    )
    return through, (grad * normed).sum(1), grad.sum(1)


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-8) over the last dimension, in x's dtype."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
