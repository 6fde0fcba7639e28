"""What is measured of all tokens of both sides of the hold-out, each read once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.evaluation.pieces import Reading, read
from pipeline.systems.cvfp.evaluation.probe import MOST, Probe, ProbeResult, classes_of
from pipeline.systems.cvfp.evaluation.reader import Reads
from pipeline.systems.cvfp.evaluation.sums import ContextSums


@dataclass(frozen=True)
class Whole:
    """Of any weights, trained or not."""

    effective_rank: float
    """Of all training tokens, as a share of the width."""
    context: ProbeResult
    embedding: ProbeResult

    def figures(self) -> dict[str, float]:
        """By the names of scalars."""
        context, embedding = self.context, self.embedding
        return {
            "effective_rank/train_all": self.effective_rank,
            "probe/context": context.accuracy,
            "probe/embedding": embedding.accuracy,
            "probe/ratio": context.accuracy / embedding.accuracy if embedding.accuracy else float("inf"),
            "probe/most_frequent": context.most_frequent,
        }


def measure_whole(reader: Reads, reading: Reading, sync_point: SyncPoint) -> Whole:
    """One pass over all training tokens, whose sums give the effective rank, and one over all held-out ones, on which
    both probes are scored. These are fitted to all training tokens, or every k-th row of them; of more documents no
    more is kept. Collective."""
    topology = sync_point.topology
    available = {training: reading.available(training=training) for training in (True, False)}
    classes = classes_of(np.concatenate(reading.chosen(available[True], training=True)))
    sums = ContextSums(reader.width, reader.device)
    every = math.ceil(available[True] / MOST)
    probes = [Probe(reader.width, classes, reader.device, every) for _ in range(2)]
    for piece in read(reader, reading, available[True], sync_point, training=True):
        sums.add(piece.contexts[piece.mask])
        for probe, features in zip(probes, (piece.contexts, reader.embedded(piece.ids)), strict=True):
            probe.add(features, piece.ids, piece.mask, piece.numbers)
    rank = sums.reduce(topology).effective_rank() / reader.width
    readouts = [probe.fit(topology) for probe in probes]
    for piece in read(reader, reading, available[False], sync_point, training=False):
        for readout, features in zip(readouts, (piece.contexts, reader.embedded(piece.ids)), strict=True):
            readout.score(features, piece.ids, piece.mask)
    context, embedding = (readout.result(topology) for readout in readouts)
    return Whole(rank, context, embedding)
