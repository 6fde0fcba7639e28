"""Pre-norm blocks of bidirectional attention and an MLP."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): 12 d^2 + 13 d parameters, biases everywhere, no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """hidden [rows, L, d]; visible [rows, 1, 1, L] bool: the positions that every position of the row may see, one
        at least."""
        q, k, v = rearrange(self.qkv(self.attention_norm(hidden)), "b l (n h d) -> n b h l d", n=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        hidden = hidden + self.out(rearrange(mixed, "b h l d -> b l (h d)"))
        return hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))
