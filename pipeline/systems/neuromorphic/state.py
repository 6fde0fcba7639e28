"""What a stream carries from span to span, and how the memories are used in a pass.

Everything is float32 (float64 for a model in float64), whatever the precision of the computation. N rows (streams of a
micro-batch), B columns, L layers, D_h the width of a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.ops.attention import WindowCarry


@dataclass(frozen=True)
class ProceduralState:
    """Of the procedural memories of all layers and columns; r slots."""

    keys: Tensor
    """[N, L, B, r, D_h], unit rows."""
    values: Tensor
    """[N, L, B, r, D_h], unit rows."""
    strengths: Tensor
    """[N, L, B, r], 0 to 3."""
    eligible_keys: Tensor
    """[N, L, B, r, D_h]: what the next commit writes."""
    eligible_values: Tensor
    """[N, L, B, r, D_h]."""


@dataclass(frozen=True)
class EpisodicState:
    """Of the episodic memories of all columns; M episodes of width E."""

    keys: Tensor
    """[N, B, M, E], unit rows."""
    values: Tensor
    """[N, B, M, E]."""
    strengths: Tensor
    """[N, B, M], 0 to 3; 0: the episode is not there."""


@dataclass(frozen=True)
class StreamState:
    """All of it. A span begins with the state that the one before it left."""

    hidden: Tensor
    """[N, L, B, D_h]: of the recurrent layers."""
    surprise: Tensor
    """[N]: mean nats per token of the span before, of the tokens after its last reset."""
    segment: Tensor
    """[N] int64: the document of the last token; -1 before the first."""
    working: WindowCarry | None
    """None before the first token."""
    procedural: ProceduralState
    episodic: EpisodicState


Use = Literal["on", "empty", "absent"]
"""on: read and written. empty: read as if nothing had been written, so that the constants of its read-out stay, and not
written. absent: it adds nothing (the episodic memory in phase A)."""


@dataclass(frozen=True)
class Uses:
    """Of each memory in a pass."""

    working: Use = "on"
    procedural: Use = "on"
    episodic: Use = "on"
    lifelong: bool = False
    """Whether procedural and episodic memory outlive a document. Everything else is emptied at a document's start."""
