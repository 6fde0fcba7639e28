"""One block: what one token does to a context in one layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relu_of(context: Tensor, token: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(W [c; u] + b) of both streams [..., D]."""
    return F.linear(torch.cat([context, token], dim=-1), weight, bias).relu_()


class Block(nn.Module):
    """Adds to both streams what one linear layer with ReLU makes of them; each has a norm of its own behind it.

    `mix` m in (0, 1]: of each sum x, (1 - m) x + m norm(x) goes on.
    """

    def __init__(self, width: int, decay: float, mix: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 2 * width)
        self.norm_context = nn.LayerNorm(width)
        self.norm_token = nn.LayerNorm(width)
        self.decay, self.mix = decay, mix

    def mixed(self, total: Tensor, norm: nn.LayerNorm) -> Tensor:
        """What goes on of the sum of a stream, whose norm this is [..., D]."""
        return self._mixed(total, norm(total))

    def _mixed(self, total: Tensor, normed: Tensor) -> Tensor:
        return normed if self.mix == 1 else torch.lerp(total, normed, self.mix)

    def forward(self, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Both [..., D]."""
        return self.added_to(context, token, relu_of(context, token, self.linear.weight, self.linear.bias))

    def added_to(self, context: Tensor, token: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams, of what the linear layer makes of them [..., 2 D]."""
        of_context, of_token = added.chunk(2, dim=-1)
        total = token + of_token
        return self.added_to_context(context, of_context), self._mixed(total, self.norm_token(total))

    def added_to_context(self, context: Tensor, added: Tensor) -> Tensor:
        decayed = torch.add(added, context, alpha=self.decay)
        return self._mixed(decayed, self.norm_context(decayed))

    def of_context(self) -> tuple[Tensor, Tensor]:
        """The rows of weight [D, 2 D] and bias [D] that make what is added to the context."""
        width = self.linear.out_features // 2
        return self.linear.weight[:width], self.linear.bias[:width]

    def with_diagonal(self, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both streams, and the diagonal [..., D] of the new context's Jacobian in the old one.

        Of the norm, only what a channel does to itself: the rest, by way of mean and variance, is of order 1 / D.
        """
        width, norm = context.shape[-1], self.norm_context
        added = F.relu(self.linear(torch.cat([context, token], dim=-1)))
        of_context, of_token = added.chunk(2, dim=-1)
        decayed = torch.add(of_context, context, alpha=self.decay)
        new, mean, scale = torch.native_layer_norm(decayed, (width,), norm.weight, norm.bias, norm.eps)
        itself = self.decay + (of_context > 0) * self.linear.weight.diagonal()[:width]
        normed = (decayed - mean) * scale
        of_norm = norm.weight * scale * (1 - (1 + normed.square()) / width)
        total = token + of_token
        diagonal = itself * (of_norm if self.mix == 1 else 1 - self.mix + self.mix * of_norm)
        return self._mixed(decayed, new), self._mixed(total, self.norm_token(total)), diagonal
