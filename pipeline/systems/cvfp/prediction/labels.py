"""The tokens that the second phase predicts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batch import IGNORED
from pipeline.systems.cvfp.documents import DocumentBatch, DocumentSet


def following(documents: DocumentSet, batch: DocumentBatch, *, way: str) -> Tensor:
    """The token after each row's last one [rows], on the CPU; IGNORED where there is none.

    Of documents (`way` document) nothing follows; a row of a stream is followed by what its document set has next, on
    the same side of the hold-out.
    """
    found = torch.full((batch.rows,), IGNORED)
    if way == "document":
        return found
    first, lengths = batch.first.cpu().numpy(), batch.lengths.cpu().numpy()
    border, last = int(documents.ends[documents.training - 1]), len(documents.tokens)
    places, ends = first + lengths, np.where(first < border, border, last)
    there = (lengths > 0) & (places < ends)
    found[torch.from_numpy(there)] = torch.from_numpy(documents.tokens[places[there]].astype(np.int64))
    return found


def labels_of(batch: DocumentBatch, after: Tensor | None = None) -> Tensor:
    """The token after each [rows, L]; IGNORED beyond a row, and at its last token, unless `after` [rows] has one."""
    labels = torch.full_like(batch.ids, IGNORED)
    labels[:, :-1] = torch.where(batch.mask[:, 1:], batch.ids[:, 1:], IGNORED)
    if after is not None:
        rows = torch.arange(batch.rows, device=labels.device)
        place = (batch.lengths - 1).clamp_min(0)
        labels[rows, place] = torch.where(batch.lengths > 0, after.to(labels.device), IGNORED)
    return labels


def count_labels(batch: DocumentBatch, after: Tensor) -> int:
    """How many `labels_of` has."""
    return int((batch.lengths - 1).clamp_min(0).sum()) + int((after != IGNORED).sum())
