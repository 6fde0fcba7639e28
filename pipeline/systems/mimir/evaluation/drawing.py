"""Peptides that a model draws for the labels and targets of held-out ones."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipeline.systems.mimir.evaluation.rows import Rows
from pipeline.systems.mimir.peptides import NO_TARGET, Peptides
from pipeline.systems.mimir.sampling.batch import Conditions, Settings, draw_batch


def draw_like(
    rows: Rows, peptides: Peptides, count: int, what: str, *, guidance: float, temperature: float, seed: int
) -> Peptides:
    """`count` peptides of the labels and targets of `peptides`, drawn at random among these, of lengths that the model
    draws. A function of the weights and the seed, on any number of ranks. Collective; raises UserError."""
    generator = np.random.Generator(np.random.PCG64(seed))
    like = generator.integers(0, len(peptides), count)
    labels, targets = peptides.labels[like], peptides.targets[like]
    sizes = rows.system.sizes
    settings = Settings(sizes.min_length, sizes.max_length, temperature, guidance)

    def compute(places: np.ndarray) -> tuple[Tensor, ...]:
        conditions = Conditions(rows.tensor(labels[places]), rows.tensor(targets[places]))
        return draw_batch(
            rows.system,
            rows.model,
            conditions,
            settings,
            seed=seed,
            domain=f"peptide suite/{what}",
            draw=rows.tensor(places),
        )

    letters, lengths = rows(f"drawing, {what}", count, compute)
    return Peptides(letters.astype(np.uint8), lengths.astype(np.uint8), labels, targets)


def targets_of(peptides: Peptides) -> np.ndarray:
    """The different targets of peptides, in their order."""
    return np.unique(peptides.targets[peptides.targets != NO_TARGET])
