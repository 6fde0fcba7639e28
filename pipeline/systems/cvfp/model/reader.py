"""A model at fixed weights, by calls alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.systems.cvfp.solve.sequential import sequential
from pipeline.systems.cvfp.solve.transition import Solved, Solver, ends_of, shifted

__all__ = ["Reader", "ends_of", "shifted"]


class Reader:
    """Computes contexts and embeddings without gradient; every call touches all weights, so all ranks make as many."""

    def __init__(self, model: nn.Module, width: int, *, exact: bool = False) -> None:
        """exact: token after token, whatever --model.solve says."""
        self.model, self.width = model, width
        self.device = next(model.parameters()).device
        self.solve: Solver | None = sequential if exact else None

    @torch.no_grad()
    def contexts(self, ids: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
        """Contexts [rows, L, D] float32 of tokens ids [rows, L], from `start` [rows, D]; None: from zero. What stands
        beyond mask [rows, L] is of no token."""
        if start is None:
            start = torch.zeros(len(ids), self.width, device=ids.device)
        return in_full(self.solved(ids, mask, start).contexts)

    @torch.no_grad()
    def solved(
        self,
        ids: Tensor,
        mask: Tensor,
        start: Tensor,
        *,
        initial: Tensor | None = None,
        solve: Solver | None = None,
    ) -> Solved:
        """As `contexts`, in the model's precision, with the number of sweeps and what the last one moved; by `solve` in
        place of the reader's own way. `initial` [rows, L, D]: near them, if sweeps are to begin there."""
        return self.model(ids, start=start, mask=mask, solve=solve or self.solve, initial=initial).solved

    @torch.no_grad()
    def embedded(self, ids: Tensor) -> Tensor:
        """The normed embeddings e_t [rows, L, D] float32."""
        return in_full(self.model(ids).embedded)

    @torch.no_grad()
    def applied(self, contexts: Tensor, ids: Tensor) -> Tensor:
        """The contexts [rows, L, D] after one application of all blocks to `contexts` and the tokens' e_t."""
        return in_full(self.model(ids, contexts, contexts_alone=True).contexts)


def in_full(tensor: Tensor) -> Tensor:
    """In float32, or in float64 as a model of that computes it."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
