"""Micro-batches, what their losses average over, and the protocol of the loaders that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that does not count in the loss."""


class Batch(Protocol):
    """One micro-batch, as the engine knows it. What it holds is between a loader and its system, and so is what it
    counts (`System.count`)."""

    @property
    def rows(self) -> int:
        """Examples in it."""
        ...

    def to(self: B, device: torch.device) -> B:
        """The same on a device, without waiting for the copy."""
        ...


B = TypeVar("B", bound=Batch)
"""The kind of batch that a loader makes and its system takes."""


@dataclass(frozen=True)
class TokenBatch:
    """Text, as rows of one micro-batch: whole sequences (every sequence rank of a group holds the same ones).

    input_ids, labels [rows, T] int64; labels are already shifted: labels[:, t] is the token after input_ids[:, t],
    or `IGNORED` where that token starts a document. segment_ids [rows, T] int64: the stream's document ordinal, the
    same in the next step when the document goes on there. positions [rows, T] int64: position within the document,
    going on across steps. streams [rows] int64: global stream ids.
    """

    input_ids: Tensor
    labels: Tensor
    segment_ids: Tensor
    positions: Tensor
    streams: Tensor

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(
            *(getattr(self, name).to(device, non_blocking=True) for name in TokenBatch.__dataclass_fields__)
        )


Counts = Mapping[str, int]
"""What each loss term averages over, e.g. {"cross_entropy": counted labels in the micro-batch}."""


class StatefulLoader(Protocol[B]):
    """Yields one optimizer step at a time: the micro-batches of this data rank."""

    def next_step(self) -> list[B]: ...

    def describe(self) -> str:
        """One line for the log: what is read, and how much of it."""
        ...

    def reset(self) -> None:
        """Back to the first step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: "fingerprint", what a resumed run must agree on, and the position after the last step.

        A loader that reads in streams gives {"streams": {global stream id: cursor}} for the streams of its data rank.
        One that does not gives a few numbers under names of its own, the same on every rank.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the state of all data ranks, with the cursors of all streams, and keeps its own. Raises UserError when
        it is of other data."""
        ...
