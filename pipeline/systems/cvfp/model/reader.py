"""A model at fixed weights, by calls alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Reader:
    """Computes contexts and embeddings without gradient; every call touches all weights, so all ranks make as many."""

    def __init__(self, model: nn.Module, width: int) -> None:
        self.model, self.width = model, width
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def contexts(self, ids: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
        """Contexts [rows, L, D] float32 of tokens ids [rows, L], from `start` [rows, D]; None: from zero. What stands
        beyond mask [rows, L] is of no token."""
        if start is None:
            start = torch.zeros(len(ids), self.width, device=ids.device)
        return in_full(self.model(ids, start=start).contexts)

    @torch.no_grad()
    def embedded(self, ids: Tensor) -> Tensor:
        """The normed embeddings e_t [rows, L, D] float32."""
        return self.model(ids).embedded.float()

    @torch.no_grad()
    def applied(self, contexts: Tensor, ids: Tensor) -> Tensor:
        """The contexts [rows, L, D] after one application of all blocks to `contexts` and the tokens' e_t."""
        return self.model(ids, contexts).contexts.float()

    @torch.no_grad()
    def states(self, contexts: Tensor, ids: Tensor) -> Tensor:
        """The token states u_t [rows, L, D] of tokens whose contexts before them are `contexts`."""
        return self.model(ids, contexts).states.float()


def in_full(tensor: Tensor) -> Tensor:
    """In float32, or in float64 as a model of that computes it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def shifted(contexts: Tensor, start: Tensor) -> Tensor:
    """The context before each token [rows, L, D]: `start` [rows, D], then those of `contexts` [rows, L, D]."""
    return torch.cat([start.unsqueeze(1).to(contexts.dtype), contexts[:, :-1]], dim=1)


def ends_of(contexts: Tensor, lengths: Tensor, start: Tensor) -> Tensor:
    """The context after each row's last token [rows, D]; that of its start for a row without one."""
    last = contexts[torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp_min(0)]
    return torch.where(lengths[:, None] > 0, last, start.to(last.dtype))
