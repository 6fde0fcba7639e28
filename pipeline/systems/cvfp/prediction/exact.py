"""What enters every token of a pass at fixed weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.systems.cvfp.config import CvfpConfig
from pipeline.systems.cvfp.documents import DocumentBatch
from pipeline.systems.cvfp.model.reader import Reader, ends_of, shifted
from pipeline.systems.cvfp.phase import DocumentLoader
from pipeline.systems.cvfp.solve.border import Border, change, from_the_left

TOLERANCE = 1e-4
"""A border of the stream has settled when its context moved by less than this share of its norm."""
LAPS = 32
"""Readings of a circle at most, where it has fewer rows."""


@torch.no_grad()
def exact_inputs(
    reader: Reader, loader: DocumentLoader, sizes: CvfpConfig, sync_point: SyncPoint, place: str
) -> Iterator[tuple[DocumentBatch, Tensor]]:
    """The micro-batches of a pass over what `loader` has, on the model's device, each with the contexts [rows, L, D]
    before its tokens. Collective.

    Of documents they are those of the recurrence from zero. Of a stream they are those of the tokens one after the
    other, to 1e-4 of the norm at each row's start: rows are read from the ends of their left neighbours again and again
    until these no longer move, which takes as many times as there are rows where contexts forget nothing. (So in a
    circle, where chaotic weights have no such contexts.) With `prediction.context` zero they are zero.
    """
    if sizes.carry != "document" and sizes.prediction.context != "zero":
        yield from _stream(reader, loader, sizes, sync_point, place)
        return
    for _ in range(loader.slots):
        for unmoved in next_step(loader, sync_point, place):
            batch = unmoved.to(reader.device)
            inputs = torch.zeros(*batch.ids.shape, reader.width, device=reader.device)
            if sizes.prediction.context != "zero":
                inputs = shifted(reader.contexts(batch.ids, batch.mask), inputs[:, 0])
            yield batch, inputs


def _stream(
    reader: Reader, loader: DocumentLoader, sizes: CvfpConfig, sync_point: SyncPoint, place: str
) -> Iterator[tuple[DocumentBatch, Tensor]]:
    topology, ring = sync_point.topology, sizes.carry == "circular"
    every = Border(topology)
    # Before the first token stands zero, and steps of adjacent rows settle their own borders.
    settled, starts, reads = sizes.adjacent and not ring, None, 0
    while not settled:
        for batch, _, after in _pass(reader, loader, sizes, sync_point, place, starts):
            ends, most = after, batch.rows * topology.data
        fresh = from_the_left(ends, topology, circular=ring)
        moved = change(fresh, torch.zeros_like(fresh) if starts is None else starts, torch.ones_like(fresh[:, 0]))
        reads, most = reads + 1, max(most, LAPS) if ring else most
        settled, starts = float(every.largest(moved)) < TOLERANCE or reads > most, fresh
    for batch, inputs, _ in _pass(reader, loader, sizes, sync_point, place, starts):
        yield batch, inputs


def _pass(
    reader: Reader,
    loader: DocumentLoader,
    sizes: CvfpConfig,
    sync_point: SyncPoint,
    place: str,
    starts: Tensor | None,
) -> Iterator[tuple[DocumentBatch, Tensor, Tensor]]:
    """Micro-batches, the contexts before their tokens, and those after their rows, of one pass from `starts` [rows, D]
    (None: zero). Collective."""
    for slot in range(loader.slots):
        # Of a stream a step is one micro-batch.
        (unmoved,) = next_step(loader, sync_point, place)
        batch = unmoved.to(reader.device)
        start = torch.zeros(batch.rows, reader.width, device=reader.device) if starts is None else starts
        if sizes.adjacent and slot:
            start = from_the_left(start, sync_point.topology, circular=True)
        contexts = reader.contexts(batch.ids, batch.mask, start)
        if sizes.adjacent:
            contexts, start = _settled(reader, batch, contexts, start, sync_point)
        starts = ends_of(contexts, batch.lengths, start)
        yield batch, shifted(contexts, start), starts


def _settled(
    reader: Reader, batch: DocumentBatch, contexts: Tensor, start: Tensor, sync_point: SyncPoint
) -> tuple[Tensor, Tensor]:
    """The contexts of rows that follow each other, and those before them, after the contexts of a first reading.
    Collective."""
    border = Border(sync_point.topology, first=start[0])
    for _ in range(batch.rows * sync_point.topology.data):
        fresh = border.starts(ends_of(contexts, batch.lengths, start), batch.lengths)
        moved = float(border.largest(change(fresh, start, batch.lengths)))
        start = fresh
        if moved < TOLERANCE:
            break
        sync_point("evaluation")
        contexts = reader.contexts(batch.ids, batch.mask, start)
    return contexts, start
