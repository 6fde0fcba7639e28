"""Sample sheets: peptides that a model draws while it is trained, as a table for a person."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.runtime.sync import SyncPoint
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING
from pipeline.systems.mimir.sampling.draw import Reads, Wanted, describe, draw_peptides
from pipeline.systems.mimir.sampling.options import PeptideOptions
from pipeline.systems.mimir.sampling.output import as_text

TARGETS, EACH = 3, 4
"""Targets of a sheet, and peptides of each."""


@torch.no_grad()
def sample_sheet(system: Reads, model: nn.Module, seed: int, sync_point: SyncPoint) -> str:
    """Background peptides, interacting ones of no target in particular, and those of the first targets, by the weights
    as they are; the noise is that of every other sheet, which shows what training changes. Collective; leaves the
    model's mode as it found it."""
    options = PeptideOptions(number=EACH, seed=seed, unique=False, likelihood=1)
    known, was_training = system.peptides, model.training
    several = [Wanted(BACKGROUND), Wanted(INTERACTING)]
    for place, name in enumerate(known.target_names[: min(TARGETS, known.training_targets)]):
        sequence = known.target_sequences[place] if known.target_sequences else None
        several.append(Wanted(INTERACTING, place, name, sequence))
    rows = []
    model.eval()
    try:
        for number, condition in enumerate(several, 1):
            sync_point(f"samples, {number} of {len(several)}")
            found = draw_peptides(system, model, condition, options)
            rows += describe(system, model, condition, found, options)[0]
    finally:
        model.train(was_training)
    return as_text(rows)
