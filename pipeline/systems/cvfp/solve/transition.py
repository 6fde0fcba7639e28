"""What a way of solving is given, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Transition(Protocol):
    """F of a context and a token, of tokens apart from each other."""

    def __call__(self, contexts: Tensor, embedded: Tensor) -> Tensor:
        """The contexts [..., D] after tokens `embedded` [..., D] that `contexts` [..., D] enter."""
        ...

    def with_diagonal(self, contexts: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """As the call, and an estimate [..., D] of the diagonal of each one's Jacobian in the context that enters."""
        ...


@dataclass(frozen=True)
class Solved:
    """The contexts of a recurrence, and what they took."""

    contexts: Tensor
    """[rows, L, D]; beyond a row's tokens, whatever."""
    sweeps: int
    """Applications of F to all tokens; of a recurrence 1."""
    residual: float
    """How far the last sweep moved a context at most, as a share of its norm; of a recurrence 0."""
    start: Tensor
    """[rows, D]: the context before each row's first token; that which was given, or what a border has brought."""
    settled: bool = True
    """Whether these are the contexts of the recurrence, to the tolerance: not where the sweeps ran out."""


class Solver(Protocol):
    """A way of solving c_t = F(c_{t-1}, e_t) for all t."""

    def __call__(
        self, transition: Transition, embedded: Tensor, start: Tensor, mask: Tensor, initial: Tensor | None = None
    ) -> Solved:
        """Of tokens `embedded` [rows, L, D], from the context `start` [rows, D] before each row's first one.

        mask [rows, L] bool: whether there is a token; a row's tokens come first. `initial` [rows, L, D]: the contexts
        of the first sweep, such as those of the pass before; zeros when None. Without gradient.
        """
        ...


def shifted(contexts: Tensor, start: Tensor) -> Tensor:
    """The context before each token [rows, L, D]: `start` [rows, D], then those of `contexts` [rows, L, D]."""
    return torch.cat([start.unsqueeze(1).to(contexts.dtype), contexts[:, :-1]], dim=1)


def ends_of(contexts: Tensor, lengths: Tensor, start: Tensor) -> Tensor:
    """The context after each row's last token [rows, D]; that of its start for a row without one."""
    last = contexts[torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp_min(0)]
    return torch.where(lengths[:, None] > 0, last, start.to(last.dtype))
