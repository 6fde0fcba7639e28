"""Modules of all columns at once: activations are [B, N, P, features], and B columns are one batched product.

The initial values are not here: `weights.py` fills every parameter by its name.
"""

from __future__ import annotations

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

    def forward(self, x: Tensor) -> Tensor:
        """x [columns, ..., inputs] -> [columns, ..., outputs], one product for all columns."""
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.bias is None:
            out = torch.bmm(flat, self.weight)
        else:
            out = torch.baddbmm(self.bias.unsqueeze(1), flat, self.weight)
        return out.view(*x.shape[:-1], out.shape[-1])


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
        shape = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
        normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(self.bias.view(shape), normed, self.weight.view(shape))


class ColumnFeedForward(nn.Module):
    """x + FFN(LN(x)) for each column: four times as wide inside, GELU."""

    def __init__(self, columns: int, features: int) -> None:
        super().__init__()
        self.norm = ColumnNorm(columns, features)
        self.inner = ColumnLinear(columns, features, 4 * features)
        self.outer = ColumnLinear(columns, 4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        """x [columns, ..., features] alike."""
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-8) over the last dimension, in x's dtype."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + UNIT_EPS)
