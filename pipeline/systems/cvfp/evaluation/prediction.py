"""Nats of held-out documents, one by one, by a fresh exact pass: of a model, of its weights without context, and of the
unigram model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.parallel.collectives import all_gather_object
from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.evaluation.control import ABLATED, LABELS, MODEL, UNIGRAM, right
from pipeline.systems.cvfp.evaluation.pieces import Reading, read
from pipeline.systems.cvfp.model.model import IGNORED
from pipeline.systems.cvfp.model.reader import Reader, shifted
from pipeline.systems.cvfp.prediction.unigram import unigram

Part = tuple[np.ndarray, Mapping[str, np.ndarray]]
"""Numbers [rows] of rows, and sums [rows] over each by their names."""


@torch.no_grad()
def nats_by_row(
    model: nn.Module, width: int, reading: Reading, sync_point: SyncPoint, *, with_context: bool
) -> dict[str, Tensor]:
    """Nats of every held-out document's labels, float64 [documents] each, the same on every rank: MODEL, UNIGRAM and
    LABELS, which are their number; with `with_context` also ABLATED; and of each but LABELS how many the
    likeliest token is right of (`control.right`). Without it every context that enters is zero.

    A document's first token is no label. With a carry that goes on, rows of the stream stand for documents. Collective.
    """
    reader = Reader(model, width, exact=True)
    nats, likeliest = unigram(reading.documents)
    table = torch.from_numpy(nats).to(reader.device)
    parts: list[Part] = []
    for piece in read(reader, reading, reading.available(training=False), sync_point, training=False):
        labels = torch.full_like(piece.ids, IGNORED)
        labels[:, :-1] = torch.where(piece.mask[:, 1:], piece.ids[:, 1:], IGNORED)
        counted = labels != IGNORED
        zeros = torch.zeros_like(piece.contexts)
        inputs = shifted(piece.contexts, piece.starts) if with_context else zeros
        found = {}
        for name, given in ((MODEL, inputs), (ABLATED, zeros)) if with_context else ((MODEL, zeros),):
            output = model(piece.ids, given, labels=labels, predict=True)
            found[name], found[right(name)] = output.losses, (output.predictions == labels) & counted
        found[UNIGRAM] = table[labels.clamp_min(0)].masked_fill(~counted, 0)
        found[right(UNIGRAM)] = (labels == likeliest) & counted
        found[LABELS] = counted
        sums = {name: value.sum(1, dtype=torch.float64).cpu().numpy() for name, value in found.items()}
        parts.append((piece.numbers.cpu().numpy(), sums))
    return _gathered(parts, sync_point)


def _gathered(parts: list[Part], sync_point: SyncPoint) -> dict[str, Tensor]:
    """In the order of their numbers, of all ranks; rows without a label are left out."""
    every = [part for ranks in all_gather_object(sync_point.topology, parts) for part in ranks]
    numbers = np.concatenate([rows for rows, _ in every])
    labels = np.concatenate([sums[LABELS] for _, sums in every])
    order = np.argsort(numbers, kind="stable")
    order = order[labels[order] > 0]
    return {name: torch.from_numpy(np.concatenate([sums[name] for _, sums in every])[order]) for name in every[0][1]}
