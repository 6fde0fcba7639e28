"""Sets of peptides of any size that a known process makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipeline.errors import UserError
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.data.process import RESIDUES, Process, ProcessSettings
from pipeline.systems.mimir.data.table import Table

SETTINGS = ProcessSettings(places=2)
"""Of the set that a run without data makes: few places are learnt in minutes, many take a small model much longer."""
_ATTEMPTS = 20


def synthetic_table(process: Process, count: int, *, interacting: float = 0.5, seed: int = 0) -> Table:
    """`count` peptides, a share `interacting` of them of targets drawn evenly; a function of the arguments alone.

    What stands there already is drawn again: a pair of target and peptide, a background peptide, or one that interacts
    as well. Raises UserError where the process has not so many.
    """
    generator = np.random.Generator(np.random.PCG64([process.settings.seed, 2, seed]))
    pairs = round(count * interacting)
    labels = np.zeros(count, np.int64)
    labels[:pairs] = 1
    targets = np.where(labels == 1, generator.integers(0, len(process.motifs), count), -1)
    sequences = np.empty(count, object)
    sequences[:pairs] = _distinct(process, labels[:pairs], targets[:pairs], set(), generator)
    sequences[pairs:] = _distinct(process, labels[pairs:], targets[pairs:], set(sequences[:pairs]), generator)
    order = generator.permutation(count)
    names = np.array([*process.target_names, ""], object)
    return Table(
        pa.array(labels[order].astype(str), pa.string()),
        pa.array(names[targets[order]], pa.string()),
        pa.array(sequences[order], pa.string()),
        parts=(("the synthetic set", count),),
    )


def _distinct(
    process: Process, labels: np.ndarray, targets: np.ndarray, taken: set[str], generator: np.random.Generator
) -> np.ndarray:
    """A sequence for each row, of which no target has two alike, and which are not in `taken`."""
    found = np.array(process.draw(labels, targets, generator), object)
    seen: set[tuple[int, str]] = set()
    rows: Sequence[int] = range(len(labels))
    for _ in range(_ATTEMPTS):
        again = []
        for row in rows:
            key = (int(targets[row]), found[row])
            if key in seen or found[row] in taken:
                again.append(row)
            else:
                seen.add(key)
        if not again:
            return found
        rows = again
        found[rows] = process.draw(labels[rows], targets[rows], generator)
    raise UserError(
        f"--count: after {_ATTEMPTS} draws {len(rows):,} of the peptides are copies still: give fewer, more"
        " --targets or a larger --max-length"
    )


def synthetic_set(count: int, model: MimirConfig) -> tuple[Table, Mapping[str, str]]:
    """The set of a run that names no data, and its targets' sequences by name. Raises UserError."""
    if count < 1:
        raise UserError(f"--data.dataset synthetic:{count}: give 1 peptide or more")
    if not set(RESIDUES) <= set(model.letters):
        raise UserError(f"--model.letters {model.letters}: the synthetic set needs {RESIDUES}: give all of them")
    process = Process(
        dataclasses.replace(
            SETTINGS,
            min_length=max(model.min_length, min(SETTINGS.min_length, model.max_length)),
            max_length=min(model.max_length, SETTINGS.max_length),
        )
    )
    sequences = dict(zip(process.target_names, process.target_sequences, strict=True))
    return synthetic_table(process, count), sequences
