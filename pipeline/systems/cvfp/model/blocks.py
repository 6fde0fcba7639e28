"""The blocks: what one token does to a context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.systems.cvfp.solve.transition import Solved, Solver


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

    def _mixed(self, total: Tensor, normed: Tensor) -> Tensor:
        return normed if self.mix == 1 else torch.lerp(total, normed, self.mix)

    def forward(self, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Both [..., D]."""
        added = F.relu(self.linear(torch.cat([context, token], dim=-1)))
        of_context, of_token = added.chunk(2, dim=-1)
        decayed = torch.add(of_context, context, alpha=self.decay)
        total = token + of_token
        return self._mixed(decayed, self.norm_context(decayed)), self._mixed(total, self.norm_token(total))

    def context_alone(self, context: Tensor, token: Tensor) -> Tensor:
        """The first of what `forward` returns, of the last block: nothing else of it is carried on."""
        width = context.shape[-1]
        rows = self.linear.weight[:width], self.linear.bias[:width]
        added = F.relu(F.linear(torch.cat([context, token], dim=-1), *rows))
        decayed = torch.add(added, context, alpha=self.decay)
        return self._mixed(decayed, self.norm_context(decayed))

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


class Blocks(nn.ModuleList):
    """All of them, one after the other: F of a context and a token.

    ZeRO-3 gathers their parameters together and once a call, which a solve of many sweeps, or over many tokens, is one
    of: ranks whose solves take different numbers of sweeps make the same calls.
    """

    def __init__(self, layers: int, width: int, decay: float, mix: float = 1.0) -> None:
        super().__init__(Block(width, decay, mix) for _ in range(layers))
        # DeepSpeed's mark of a module whose parameters are gathered as one; its own function sets the same attribute.
        self._z3_leaf = True

    def forward(
        self,
        contexts: Tensor,
        embedded: Tensor,
        *,
        solve: Solver | None = None,
        mask: Tensor | None = None,
        initial: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Solved:
        """Contexts and token states [rows, L, D] of the tokens `embedded` [rows, L, D].

        `contexts` [rows, L, D] are those that enter, one for each token. With `solve`, `contexts` [rows, D] enters each
        row's first token, and each token's own the next one; mask [rows, L] (None: every token) and initial are the
        solver's.
        """
        if solve is not None:
            if mask is None:
                mask = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
            return solve(BlocksTransition(self), embedded, contexts, mask, initial)
        token = embedded
        for block in self.in_order():
            contexts, token = block(contexts, token)
        return contexts, token

    def in_order(self) -> list[Block]:
        return [block for block in self if isinstance(block, Block)]


class BlocksTransition:
    """F of blocks whose parameters are whole, as a solver calls it (see `Transition`)."""

    def __init__(self, blocks: Blocks) -> None:
        *self.first, self.last = blocks.in_order()

    def __call__(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        token = embedded
        for block in self.first:
            contexts, token = block(contexts, token)
        return self.last.context_alone(contexts, token)

    def with_diagonal(self, contexts: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The product of the blocks' diagonals.

        What it leaves out are paths of a channel by way of others and back, which are products of weights of either
        sign; what a context keeps of itself in each block, and on which its memory rests, is in it.
        """
        token, product = embedded, torch.ones_like(contexts)
        for block in (*self.first, self.last):
            contexts, token, diagonal = block.with_diagonal(contexts, token)
            product = product * diagonal
        return contexts, product
