"""The blocks: what one token does to a context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Adds to both streams what one linear layer with ReLU makes of them; each has a norm of its own behind it."""

    def __init__(self, width: int, decay: float) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * width, 2 * width)
        self.norm_context = nn.LayerNorm(width)
        self.norm_token = nn.LayerNorm(width)
        self.decay = decay

    def forward(self, context: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """Both [..., D]."""
        added = F.relu(self.linear(torch.cat([context, token], dim=-1)))
        of_context, of_token = added.chunk(2, dim=-1)
        return self.norm_context(self.decay * context + of_context), self.norm_token(token + of_token)

    def context_alone(self, context: Tensor, token: Tensor) -> Tensor:
        """The first of what `forward` returns, of the last block: nothing else of it is carried on."""
        width = context.shape[-1]
        rows = self.linear.weight[:width], self.linear.bias[:width]
        added = F.relu(F.linear(torch.cat([context, token], dim=-1), *rows))
        return self.norm_context(self.decay * context + added)


class Blocks(nn.ModuleList):
    """All of them, one after the other: F of a context and a token.

    ZeRO-3 gathers their parameters together and once a call, which a recurrence over many tokens is one of.
    """

    def __init__(self, layers: int, width: int, decay: float) -> None:
        super().__init__(Block(width, decay) for _ in range(layers))
        # DeepSpeed's mark of a module whose parameters are gathered as one; its own function sets the same attribute.
        self._z3_leaf = True

    def forward(self, contexts: Tensor, embedded: Tensor, *, recurrent: bool = False) -> tuple[Tensor, Tensor | None]:
        """Contexts and token states [rows, L, D] of the tokens `embedded` [rows, L, D].

        `contexts` [rows, L, D] are those that enter, one for each token. `recurrent`: `contexts` [rows, D] enters the
        first token, and each token's own enters the next one; there are no token states then.
        """
        if recurrent:
            return self._sequential(contexts, embedded), None
        token = embedded
        for block in self:
            contexts, token = block(contexts, token)
        return contexts, token

    def _sequential(self, context: Tensor, embedded: Tensor) -> Tensor:
        found = torch.empty_like(embedded)
        *first, last = self
        for position in range(embedded.shape[1]):
            token = embedded[:, position]
            for block in first:
                context, token = block(context, token)
            context = last.context_alone(context, token)
            found[:, position] = context
        return found
