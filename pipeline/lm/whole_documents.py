"""Held-out documents laid out a row each, from their first token on: borders of the window are alike in all rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED, TokenBatch
from pipeline.lm.held_out import Evaluated
from pipeline.parallel.collectives import all_gather_object, shared_errors
from pipeline.runtime.sync import SyncPoint, next_step
from pipeline.system import Phase


@dataclass(frozen=True)
class Document:
    """What the held-out steps hold of one document, from its start: input_ids and labels [tokens] int64."""

    stream: int
    segment: int
    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.input_ids.numel()


def documents_beyond(system: Evaluated, phase: Phase, sync_point: SyncPoint, window: int) -> list[Document]:
    """The documents of all data ranks with a label at position `window` or later, longest first; the same list on
    every rank and for every layout of ranks. Collective.

    They are those of `--evaluation.steps` steps; one that goes on behind them counts as far as it was read. Held-out
    data that begins anew within these steps gives no document twice.
    """
    topology = sync_point.topology
    with shared_errors(topology):
        loader = system.held_out(phase, topology)
    parts: dict[tuple[int, int], list[tuple[Tensor, Tensor, int]]] = {}
    for _ in range(system.config.evaluation.steps):
        for batch in next_step(loader, sync_point, "evaluation"):
            for row, stream in enumerate(batch.streams.tolist()):
                segments, lengths = batch.segment_ids[row].unique_consecutive(return_counts=True)
                sizes = lengths.tolist()
                columns = (part[row].split(sizes) for part in (batch.input_ids, batch.labels, batch.positions))
                for segment, ids, labels, positions in zip(segments.tolist(), *columns, strict=True):
                    parts.setdefault((stream, segment), []).append((ids, labels, int(positions[0])))
    own = [
        Document(*key, torch.cat([ids for ids, _, _ in pieces]), torch.cat([labels for _, labels, _ in pieces]))
        for key, pieces in parts.items()
        if pieces[0][2] == 0
    ]
    own = [document for document in own if bool((document.labels[window:] != IGNORED).any())]
    # The ranks of a sequence group have read the same.
    everyone = all_gather_object(topology, own if topology.sequence_rank == 0 else [])
    found = [document for documents in everyone for document in documents]
    return _once(sorted(found, key=lambda document: (-len(document), document.stream, document.segment)))


def _once(documents: Sequence[Document]) -> list[Document]:
    """Without those whose tokens another one begins with; longest first. A copy would be its own control, and would
    make intervals over documents too narrow."""
    kept: list[Document] = []
    for document in documents:
        ids = document.input_ids
        if not any(torch.equal(other.input_ids[: len(ids)], ids) for other in kept):
            kept.append(document)
    return kept


def group_size(config: RunConfig) -> int:
    """Rows of a batch of an evaluation."""
    return config.evaluation.batch_size or config.batch_size


def grouped(documents: Sequence[Document], rows: int, *, least: int = 1) -> list[Sequence[Document]]:
    """Documents in groups of about the same number of them, neighbours together: at most `rows` each, or, with `least`
    of 2, at least that many where there are so many at all."""
    count = -(-len(documents) // rows) if least == 1 else max(1, len(documents) // max(rows, least))
    bounds = [index * len(documents) // count for index in range(count + 1)]
    return [documents[start:end] for start, end in pairwise(bounds)]


def rounds(groups: Sequence[Sequence[Document]], data_degree: int) -> list[Sequence[Sequence[Document]]]:
    """Groups that the data ranks run at the same time. A rank without one of its own in the last round finds one that
    another runs too: the ranks must make as many forward passes each."""
    return [groups[start : start + data_degree] for start in range(0, len(groups), data_degree)]


def pieces(
    group: Sequence[Document], longest: int, piece: int, grain: int, *, counted: bool, device: torch.device
) -> list[TokenBatch]:
    """The rows of a group in steps of `piece` tokens, the last one a multiple of `grain`, up to `longest` tokens.

    `group` is longest first: a row ends with its document's last step, so that later steps have fewer rows, one at the
    least. `counted`: whether labels count. Behind its document a row is padded with one that has no labels.
    """
    whole = longest // piece * piece
    ends = [*range(piece, whole + 1, piece)]
    if longest > whole:
        ends.append(whole + min(piece, -(-(longest - whole) // grain) * grain))
    length = ends[-1]
    places = torch.arange(length).expand(len(group), -1)
    sizes = torch.tensor([[len(document)] for document in group])
    padding = places >= sizes
    ids, labels = torch.zeros_like(places), torch.full_like(places, IGNORED)
    for row, document in enumerate(group):
        ids[row, : len(document)] = document.input_ids
        if counted:
            labels[row, : len(document)] = document.labels
    segments = torch.tensor([[document.segment] for document in group]) + padding.long()
    positions = places - torch.where(padding, sizes, 0)
    streams = torch.tensor([document.stream for document in group])
    steps = []
    for start, end in pairwise([0, *ends]):
        rows = max(1, int((sizes > start).sum()))
        part = (slice(rows), slice(start, end))
        batch = TokenBatch(ids[part], labels[part], segments[part], positions[part], streams[:rows])
        steps.append(batch.to(device))
    return steps
