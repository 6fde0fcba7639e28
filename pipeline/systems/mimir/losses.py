"""The loss of a micro-batch: noise, one prediction, and the terms that the config weighs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import Counts
from pipeline.systems.mimir.config import MimirConfig
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.noise import uniforms
from pipeline.systems.mimir.peptides import DROPPED, NO_TARGET, PeptideBatch

CE, VB, LENGTH = "ce", "vb", "length"
"""Loss terms: cross-entropy, averaged over the residues that it counts; the variational bound, over all residues; the
length head's cross-entropy, over peptides."""
UNIT = 2**20
"""Counts are whole, and the weight of a peptide's cross-entropy by its masked share is not: they are in parts of one
over this."""


@dataclass(frozen=True)
class Weights:
    """By what the means of ce and vb are multiplied in the loss."""

    ce: float
    vb: float


def loss_weights(config: MimirConfig) -> Weights:
    if config.loss == "bound":
        return Weights(0.0, 1.0)
    return Weights(1.0, config.hybrid_loss_coeff if config.loss == "hybrid" else 0.0)


def noise_levels(config: MimirConfig, kernel: Kernel, batch: PeptideBatch, seed: int) -> Tensor:
    """The timestep of each peptide, [rows] int64: a function of seed and example, and of the curriculum."""
    warm = config.curriculum_epochs
    progress = batch.epochs.double() / warm if warm else 1.0
    return kernel.timesteps(seed, batch.domain, batch.draws, batch.lengths, progress)


def count(config: MimirConfig, kernel: Kernel, batch: PeptideBatch, seed: int) -> Counts:
    """What the terms average over; rows that only fill a batch count for nothing."""
    counts, kept = kernel.counts(noise_levels(config, kernel, batch, seed), batch.lengths), batch.weights.double()
    found = {CE: round(float((counts.ce * kept).sum()) * UNIT), VB: int((counts.vb * kept).sum())}
    return {**found, LENGTH: int(kept.sum())} if config.length == "head" else found


def withheld(config: MimirConfig, batch: PeptideBatch, seed: int) -> tuple[Tensor, Tensor]:
    """Labels and targets as the model is told them in training [rows]: of some examples neither, of some no target."""
    u = uniforms(seed, f"{batch.domain}/withheld", batch.draws, 1, 2)[:, 0]
    both, target = u[:, 0] < config.label_dropout, u[:, 1] < config.target_dropout
    labels = torch.where(both, DROPPED, batch.labels)
    return labels, torch.where(both | target, NO_TARGET, batch.targets)
