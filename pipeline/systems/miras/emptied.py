"""What an evaluation may do to a memory: empty it at the borders of the attention window, or change its state.

The control of a memory's worth: what the same weights gain with nothing in memory from beyond the window is gained by
adapting to the data, not by remembering.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pipeline.systems.miras.config import MemoryConfig

WINDOWS = 2**20
"""Windows that a document has at the most, for ids that stay apart."""

EMPTIED: Mapping[str, Any] = {"memory": True, "emptied": True}
"""The options of the pass in which memory holds nothing from beyond what attention sees. Memories that take in every
token are emptied at every border. `overflow` takes in only what has left the window, so nothing is written to it; its
share of what attention gives stays, since that is trained too and can adapt the model without remembering. `slots`
without a token are the backbone itself: attention to the window alone."""

WITHOUT: Mapping[str, Any] = {"memory": False}
"""The options of the pass without memory."""

STATES = tuple(f"memory.{name}" for name in ("memory", "momentum", "keys", "values", "counts", "ages", "weights"))
"""Ends of the names of what a memory holds, in a carry: (M, S), without the tokens that a convolution still needs; or
slots."""


def emptied_options(kinds: Iterable[MemoryConfig]) -> Mapping[str, Any]:
    """The options of the emptied pass of these memories: where all are `slots`, that without memory, which is the same
    and is measured anyway."""
    return WITHOUT if all(kind.attachment == "slots" for kind in kinds) else EMPTIED


def split_at_windows(segment_ids: Tensor, positions: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cuts documents at the multiples of `window` tokens: ids and positions [batch, sequence] int64 of the pieces.

    To a memory each piece is a document of its own, so that its state and its convolution's tail begin anew. The ids
    are the same however a document is split over steps.
    """
    return segment_ids * WINDOWS + positions // window, positions % window


def is_state(name: str) -> bool:
    """Whether an entry of a carry is what a memory holds."""
    return name.endswith(STATES)
