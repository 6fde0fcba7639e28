"""What a figure of trained weights is compared with: measured once in a process, since no update changes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.runtime.sync import SyncPoint
from pipeline.systems.cvfp.evaluation.passes import PassDifferences, Positions, by_position, pass_differences
from pipeline.systems.cvfp.evaluation.pieces import Reading, padded, read
from pipeline.systems.cvfp.evaluation.rank import gaussian_rank
from pipeline.systems.cvfp.evaluation.reader import Reads
from pipeline.systems.cvfp.evaluation.sums import ContextSums

Untrained = Callable[[bool], Reads]
"""The same model with the weights that it begins with, of its own config (False) or as published (True). Collective."""
PAIRS = 100
"""Random pairs of a context and a token that the identity check looks at."""


@dataclass(frozen=True)
class Measured:
    """What is measured of any weights, trained or not, at the same numbers of tokens."""

    train: ContextSums
    val: ContextSums
    passes: PassDifferences
    positions: Positions
    identity: float
    """Mean cosine of a random context before and after one application of the blocks."""

    def figures(self) -> dict[str, float]:
        """By the names of scalars; the effective ranks as shares of the width."""
        width = self.val.width
        return {
            "effective_rank/train": self.train.effective_rank() / width,
            "effective_rank/val": self.val.effective_rank() / width,
            "final_diff": self.passes.final,
            "final_diff_relative": self.passes.relative,
            "norm": self.val.norm,
            "spread": self.val.spread,
            "distance_of_contexts": self.val.distance,
            "cosine_of_contexts": self.val.cosine,
            "sparsity": self.val.sparsity,
            "embedding_cosine": self.val.embedding_cosine,
            "identity_cosine": self.identity,
        }


def measure(reader: Reads, reading: Reading, tokens: int, sync_point: SyncPoint) -> Measured:
    """Of the first `tokens` training tokens and as many held-out ones. Collective."""
    documents = reading.documents
    train = sums_of(reader, reading, tokens, sync_point, training=True)
    val = sums_of(reader, reading, tokens, sync_point, training=False)
    stream = documents.tokens[: documents.ends[documents.training - 1]]
    passes = pass_differences(reader, stream, sync_point)
    positions = by_position(reader, *first_rows(reading, tokens, reader.device), sync_point)
    sync_point("evaluation")
    return Measured(train, val, passes, positions, identity_cosine(reader, documents.vocab))


def first_rows(reading: Reading, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask [rows, L], two rows or more, of the first held-out documents, or parts of their stream, among the
    first `tokens`; beside one alone, of the first document that is trained on."""
    sequences = reading.chosen(tokens, training=False)
    if reading.carry != "document":
        stream = np.concatenate(sequences)
        sequences = np.array_split(stream, max(1, -(-len(stream) // reading.length)))
    if len(sequences) == 1:
        sequences += reading.chosen(reading.length, training=True)[:1]
    return padded(sequences[: max(2, reading.rows)], device)


def sums_of(reader: Reads, reading: Reading, tokens: int, sync_point: SyncPoint, *, training: bool) -> ContextSums:
    """Sums over the contexts of the first `tokens` tokens of either side of the hold-out, of all ranks. Collective."""
    sums = ContextSums(reader.width, reader.device)
    for piece in read(reader, reading, tokens, sync_point, training=training):
        sums.add(piece.contexts[piece.mask], reader.embedded(piece.ids)[piece.mask])
    return sums.reduce(sync_point.topology)


def identity_cosine(reader: Reads, vocab: int) -> float:
    """Mean cosine of 100 random contexts, of independent standard normal numbers, before and after one application of
    the blocks with random tokens; near 1 the blocks are the identity on contexts. Collective."""
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randn(1, PAIRS, reader.width, generator=generator).to(reader.device)
    ids = torch.randint(vocab, (1, PAIRS), generator=generator).to(reader.device)
    after: Tensor = reader.applied(contexts, ids)
    return float(torch.nn.functional.cosine_similarity(contexts.double(), after.double(), dim=-1).mean())


def gaussian_figures(tokens: int, width: int, threshold: float) -> dict[str, float]:
    """What contexts of independent standard normal numbers have, two of the same token being independent too: the
    effective rank of `tokens` of them as a share of the width, the mean distance of two, the same as a share of the
    root mean square norm, the mean square of their difference, the share of pairs that are nearer than the threshold
    allows, and what the checks for an identity and for an attractor ask for."""
    half = torch.tensor(width / 2, dtype=torch.float64)
    # |a - b|^2 / 2 is a chi-square number of `width` degrees of freedom.
    root = float(torch.exp(torch.lgamma(half + 0.5) - torch.lgamma(half)))
    distance = 2 * root
    near = float(torch.special.gammainc(half, half * threshold / 2))
    return {
        "effective_rank": gaussian_rank(tokens, width) / width,
        "final_diff": distance,
        "final_diff_relative": distance / width**0.5,
        "converged": near,
        "converged_val": near,
        "start_distance": 2.0,
        "start_distance_val": 2.0,
        "norm": 2**0.5 * root,
        "spread": width**0.5,
        "distance_of_contexts": (2 * width) ** 0.5,
        "cosine_of_contexts": 0.0,
        "embedding_cosine": 0.0,
        "identity_cosine": 0.0,
    }
