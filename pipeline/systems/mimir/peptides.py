"""Peptides as the parts of the system pass them to each other: batches, and what is known of a set of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_TARGET = -1
"""The target of a background peptide, and of one whose target is not known or withheld."""
DROPPED = -1
"""The label of an example whose label is withheld."""
BACKGROUND, INTERACTING = 0, 1


@dataclass(frozen=True)
class PeptideBatch:
    """Peptides of one micro-batch.

    letters [rows, L] int64: letter ids, 0 beyond a peptide's length, L the longest that the model takes. lengths [rows]
    int64. labels [rows] int64: 0 background, 1 interacting. targets [rows] int64: index among the names of the set, or
    `NO_TARGET`. weights [rows] float32: 1, or 0 for a row that only fills the last batch of an epoch. draws [rows]
    int64: the example's number in the run, counted over its epochs, which its noise is a function of. epochs [rows]
    float32: passes over the training data done before it. domain: what else its noise is a function of, such as
    "train" or "held out".
    """

    letters: Tensor
    lengths: Tensor
    labels: Tensor
    targets: Tensor
    weights: Tensor
    draws: Tensor
    epochs: Tensor
    domain: str

    @property
    def rows(self) -> int:
        return self.letters.shape[0]

    def to(self, device: torch.device) -> PeptideBatch:
        names = [field.name for field in dataclasses.fields(self) if field.name != "domain"]
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class Peptides:
    """Peptides of one kind of use: training or held out. letters [N, L] uint8, lengths [N] uint8, labels [N] int8,
    targets [N] int32, each as in `PeptideBatch`."""

    letters: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


def chosen(peptides: Peptides, rows: np.ndarray) -> Peptides:
    """Those at indices, or of a mask."""
    return Peptides(peptides.letters[rows], peptides.lengths[rows], peptides.labels[rows], peptides.targets[rows])


def some(peptides: Peptides, count: int, seed: int = 0) -> Peptides:
    """`count` of them at random, in their order; all where there are no more."""
    return peptides if len(peptides) <= count else chosen(peptides, some_rows(len(peptides), count, seed))


def some_rows(number: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` of range(number) at random, ascending; all where there are no more."""
    if number <= count:
        return np.arange(number)
    return np.sort(np.random.Generator(np.random.PCG64(seed)).permutation(number)[:count])


@dataclass(frozen=True)
class PeptideSet:
    """What rank 0 has read of the data, split; sent to all ranks."""

    training: Peptides
    held_out: Peptides
    """Of clusters of sequences that training has nothing of; targets that training knows."""
    held_out_targets: Peptides
    """Of targets that training has nothing of; empty where there is only one target or none."""
    target_names: Sequence[str]
    """By index; those of the training data come first."""
    training_targets: int
    """How many of the names the training data has."""
    target_sequences: Sequence[str] | None
    """Amino-acid sequences by index, where they are known."""
    fingerprint: str
    """Hash of all that is above."""
    notes: tuple[str, ...] = ()
    """What was left out, and how much of it, such as "3 copies"."""
