"""The blocks: what one token does to a context."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.systems.cvfp.model.block import Block, relu_of
from pipeline.systems.cvfp.model.frugal import applied
from pipeline.systems.cvfp.model.packed import packed_relu
from pipeline.systems.cvfp.solve.transition import Solved, Solver


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
        contexts_alone: bool = False,
    ) -> tuple[Tensor, Tensor | None] | Solved:
        """Contexts and token states [rows, L, D] of the tokens `embedded` [rows, L, D].

        `contexts` [rows, L, D] are those that enter, one for each token. With `solve`, `contexts` [rows, D] enters each
        row's first token, and each token's own the next one; mask [rows, L] (None: every token) and initial are the
        solver's. `contexts_alone`: None for token states, which the last block then does not compute.
        """
        if solve is not None:
            if mask is None:
                mask = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
            return solve(BlocksTransition(self, embedded.shape[1]), embedded, contexts, mask, initial)
        if torch.is_grad_enabled():
            found, states = applied(self.in_order(), contexts, embedded, last_token=not contexts_alone)
            return found, None if contexts_alone else states
        if contexts_alone:
            return BlocksTransition(self, 0)(contexts, embedded), None
        token = embedded
        for block in self.in_order():
            contexts, token = block(contexts, token)
        return contexts, token

    def in_order(self) -> list[Block]:
        return [block for block in self if isinstance(block, Block)]


class BlocksTransition:
    """F of blocks whose parameters are whole, as a solver calls it (see `Transition`): of the last block, the context
    alone."""

    def __init__(self, blocks: Blocks, length: int) -> None:
        """length: tokens of a row, and so the calls with contexts [rows, D] of a solver that reads token by token."""
        *self.first, self.last = blocks.in_order()
        self.length = length
        self._packed: list[Callable[[Tensor], Tensor]] = []

    def __call__(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        token, last = embedded, self.last
        if contexts.dim() > 2:
            for block in self.first:
                contexts, token = block(contexts, token)
            return last.added_to_context(contexts, relu_of(contexts, token, *last.of_context()))
        if not self._packed:
            weights = [*((block.linear.weight, block.linear.bias) for block in self.first), last.of_context()]
            self._packed = [packed_relu(weight, bias, len(contexts), self.length) for weight, bias in weights]
        *first, of_last = self._packed
        for block, added in zip(self.first, first, strict=True):
            contexts, token = block.added_to(contexts, token, added(torch.cat([contexts, token], dim=-1)))
        return last.added_to_context(contexts, of_last(torch.cat([contexts, token], dim=-1)))

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
