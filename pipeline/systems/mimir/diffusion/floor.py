"""What no model can beat: the cross-entropy of the best denoiser of independent residues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.systems.mimir.diffusion.kernel import Kernel


@dataclass(frozen=True)
class Floor:
    """Of peptides whose residues are independent of each other, nats per residue.

    ce: the mean of `Terms.ce`. It depends on the kernel and on T, so cross-entropies of different ones are not to be
    compared; their distances to their floors are. entropy: of a residue, which the variational bound of the best
    denoiser is, whatever the kernel. A model that knows more than the composition goes below both.
    """

    ce: float
    entropy: float


def floor(kernel: Kernel, frequencies: np.ndarray, weights: np.ndarray | None = None) -> Floor:
    """The floor of a composition, [K] (counts or shares), or of a composition by position, [positions, K].

    By position, weights [positions] are the numbers of residues there; left out, the sums of frequencies are, which
    they are where frequencies are counts.
    """
    counts = np.atleast_2d(np.asarray(frequencies, dtype=np.float64))
    residues = counts.sum(-1) if weights is None else np.asarray(weights, dtype=np.float64)
    if counts.shape[-1] != kernel.K or residues.shape != counts.shape[:1]:
        raise ValueError(f"frequencies {counts.shape}, weights {residues.shape} of a kernel of {kernel.K} letters")
    if not (counts >= 0).all() or not (residues >= 0).all() or not residues.sum() > 0:
        raise ValueError("frequencies and weights of a composition: 0 or more, and not all of them 0")
    used = residues > 0
    shares = counts[used] / counts[used].sum(-1, keepdims=True)
    residues = residues[used] / residues.sum()
    each = kernel.cross_entropy_floor(torch.from_numpy(shares)).numpy()
    entropies = torch.special.entr(torch.from_numpy(shares)).sum(-1).numpy()
    return Floor(ce=float(residues @ each), entropy=float(residues @ entropies))
