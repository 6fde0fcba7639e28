"""What the model reads of a span of tokens, and what it leaves for the memories to write at the span's end."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """P tokens of N rows, as they come to the columns. They depend on the tokens and the working memory alone."""

    x: Tensor
    """[N, P, D]: embeddings."""
    working: Tensor
    """[N, P, D]: what the working memory says."""
    columns: Tensor
    """[B, N, P, H]: the input of each column."""
    context: Tensor
    """[B, N, P, H]: what the working memory says to each column."""
    segment_ids: Tensor
    """[N, P]."""


class Reading(NamedTuple):
    """What the columns made of a span, or of a part of it."""

    decoded: Tensor
    """[N, P, D]: what the head reads."""
    layers: tuple[Tensor, ...]
    """L + 1 of [B, N, P, H]: the input of the first layer, and the outputs of all."""
    hidden: Tensor
    """[N, L, B, H]: h after the last token, in the dtype of state."""
    statistics: dict[str, Tensor]
    """Means over rows and tokens, each [L, B], where they were asked for."""
