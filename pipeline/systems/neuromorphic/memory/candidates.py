"""What may become an episode at the end of a span."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """The tokens of a span that are most novel to a column, most novel first."""

    keys: Tensor
    """[N, B, C, E], unit rows."""
    values: Tensor
    """[N, B, C, E]."""
    novelty: Tensor
    """[N, B, C], 0 to 1."""
    valid: Tensor
    """[N, B, C] bool: false where a span has fewer tokens that count."""
    positions: Tensor
    """[N, B, C] int64, in the span."""
    mean_key: Tensor
    """[N, B, E], over all tokens that count."""
    mean_novelty: Tensor
    """[N, B], over all tokens that count."""
