"""Likelihoods of peptides in bits."""

from __future__ import annotations

import math

import numpy as np

from pipeline.systems.mimir.evaluation.estimates import Estimate, ratio


def bits_per_residue(
    nats: np.ndarray, lengths: np.ndarray, groups: np.ndarray | None = None, *, seed: int = 0
) -> Estimate:
    """The bound of a set of peptides in bits per residue, from the nats [N] and the lengths [N] of whole peptides.

    Its interval is over groups [N] of peptides that are no independent ones, such as those of a target (None: over
    peptides), and holds for peptides drawn as these are.
    """
    return ratio(nats / math.log(2), lengths.astype(np.float64), groups, seed=seed)
