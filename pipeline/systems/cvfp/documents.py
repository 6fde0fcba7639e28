"""What passes between the data and the rest of the cvfp system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class DocumentSet:
    """Tokenised documents: what rank 0 lists, and every rank has.

    tokens [total] uint32: all documents' tokens, one after the other, training first; ends [documents] int64: where
    each ends. The first `training` documents are trained on, the others held out; no document is in both.
    """

    tokens: np.ndarray
    ends: np.ndarray
    training: int
    vocab: int
    name: str
    """For messages and logs."""
    fingerprint: str
    """Hash of all that decides it: tokens, where documents end, which are held out, tokenizer."""
    tokenizer: str = ""
    """The fingerprint of the tokenizer."""
    notes: tuple[str, ...] = ()
    """What was cut or left out, for the log."""

    def document(self, index: int) -> np.ndarray:
        """The tokens [length] of one document."""
        return self.tokens[(self.ends[index - 1] if index else 0) : self.ends[index]]


@dataclass(frozen=True)
class DocumentBatch:
    """Documents, or parts of the stream, as rows of one micro-batch, the same ones in the same slot in every pass.

    ids [rows, L] int64, 0 beyond a row's length; lengths [rows] int64, 0 for a row that is filled up; streams [rows]
    int64: global stream ids; first [rows] int64: the global position (in the order of `DocumentSet.tokens`) of a
    row's first token, on which noise depends.
    """

    ids: Tensor
    lengths: Tensor
    streams: Tensor
    first: Tensor
    slot: int
    """Which of its documents or parts each stream shows: the same number in all rows."""
    slots: int
    """Steps of one pass."""
    iteration: int
    """Passes that were read before this one."""

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def mask(self) -> Tensor:
        """[rows, L] bool: whether there is a token."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]

    def to(self, device: torch.device) -> DocumentBatch:
        tensors = ("ids", "lengths", "streams", "first")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


def rows_of(documents: DocumentSet, indices: Sequence[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [len(indices), width] int64 with 0 behind each document's end, and lengths; -1: a row of length 0."""
    ids, lengths = np.zeros((len(indices), width), np.int64), np.zeros(len(indices), np.int64)
    for row, index in enumerate(indices):
        if index >= 0:
            tokens = documents.document(index)[:width]
            ids[row, : len(tokens)], lengths[row] = tokens, len(tokens)
    return ids, lengths
