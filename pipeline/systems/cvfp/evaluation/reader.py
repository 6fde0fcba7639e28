"""A model at fixed weights, as the measures of contexts need it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Reads(Protocol):
    """Computes contexts without gradient; every call touches all weights, so all ranks make as many calls."""

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def device(self) -> torch.device: ...

    def contexts(self, ids: Tensor, mask: Tensor, start: Tensor | None = None) -> Tensor:
        """Contexts [rows, L, D] of tokens ids [rows, L], by an exact pass from `start` [rows, D]; None: from zero.

        mask [rows, L] bool: whether there is a token; these come first in a row. What stands beyond them is not read.
        """
        ...

    def embedded(self, ids: Tensor) -> Tensor:
        """The normed embeddings e_t [rows, L, D]."""
        ...

    def applied(self, contexts: Tensor, ids: Tensor) -> Tensor:
        """The contexts [rows, L, D] after one application of all blocks to `contexts` [rows, L, D] and the tokens' e_t,
        all positions apart."""
        ...
