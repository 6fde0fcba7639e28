"""The likelihoods of held-out peptides: bounds, cross-entropies by timestep, and those under other targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.systems.mimir.evaluation.rows import Rows
from pipeline.systems.mimir.peptides import INTERACTING, NO_TARGET, Peptides
from pipeline.systems.mimir.sampling.batch import Conditions, denoiser

DOMAIN = "peptide suite"
SEED = 0


@dataclass(frozen=True)
class Likelihoods:
    """Of N peptides given label, target and length. nats [N]: the variational bound with prior and reconstruction. ce
    [N, T]: sums of the cross-entropies of the residues that count at timesteps 1..T; counts [N, T] of these."""

    nats: np.ndarray
    ce: np.ndarray
    counts: np.ndarray


def likelihoods(rows: Rows, peptides: Peptides, what: str) -> Likelihoods:
    """Every peptide at every timestep, with its own noise. Collective."""

    def compute(places: np.ndarray) -> tuple[Tensor, ...]:
        return _terms(rows, peptides, places, peptides.labels[places], peptides.targets[places])

    return Likelihoods(*rows(f"likelihoods, {what}", len(peptides), compute))


def target_ratios(rows: Rows, peptides: Peptides, candidates: np.ndarray, what: str) -> np.ndarray:
    """log p(peptide | target) - log p(peptide | no target), both of interacting peptides and by their bounds, in nats:
    [N, targets] of candidates [N, targets], NaN where one is `NO_TARGET`. The noise of a peptide is the same under all
    of its targets. Collective."""
    count, width = candidates.shape
    told = np.concatenate([np.full((count, 1), NO_TARGET), candidates], axis=1)

    def compute(pairs: np.ndarray) -> tuple[Tensor, ...]:
        places = pairs // (width + 1)
        return _terms(rows, peptides, places, np.full(len(pairs), INTERACTING), told.ravel()[pairs])[:1]

    (nats,) = rows(f"rankings, {what}", told.size, compute)
    nats = nats.reshape(told.shape)
    return np.where(candidates == NO_TARGET, np.nan, nats[:, :1] - nats[:, 1:])


def decoys(peptides: Peptides, known: Peptides, pool: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """The target of each peptide, then at most `count` others of `pool`, at random: [N, 1 + decoys], `NO_TARGET` where
    a peptide has fewer. None of them is a target of that peptide in `known` (which has all pairs)."""
    pairs: dict[bytes, set[int]] = {}
    for key, target in zip(_keys(known), known.targets.tolist(), strict=True):
        pairs.setdefault(key, set()).add(target)
    generator = np.random.Generator(np.random.PCG64(seed))
    found = []
    for key, target in zip(_keys(peptides), peptides.targets.tolist(), strict=True):
        others = [other for other in generator.permutation(pool).tolist() if other not in pairs[key] | {target}]
        found.append([target, *others[:count]])
    width = max(map(len, found), default=1)
    return np.array([row + [NO_TARGET] * (width - len(row)) for row in found], np.int64).reshape(len(found), width)


def _keys(peptides: Peptides) -> list[bytes]:
    """Of the residues of each peptide, equal where these are."""
    pairs = zip(peptides.letters, peptides.lengths.tolist(), strict=True)
    return [row[:length].tobytes() for row, length in pairs]


def _terms(
    rows: Rows, peptides: Peptides, places: np.ndarray, labels: np.ndarray, targets: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """(nats [n], ce [n, T], counts [n, T]) float64 of the peptides at `places` [n], under labels and targets [n]."""
    kernel = rows.system.kernel
    x0, lengths = rows.tensor(peptides.letters[places]), rows.tensor(peptides.lengths[places])
    draw = rows.tensor(places)
    denoise = denoiser(rows.system, rows.model, Conditions(rows.tensor(labels), rows.tensor(targets)), lengths)
    nats = kernel.prior_bound(x0, lengths).sum(-1, dtype=torch.float64)
    ce, counts = [], []
    for timestep in range(1, kernel.T + 1):
        t = torch.full_like(lengths, timestep)
        xt = kernel.corrupt(x0, t, lengths, SEED, DOMAIN, draw)
        terms = kernel.terms(denoise(xt, t), x0, xt, t, lengths)
        nats += terms.vb.sum(-1, dtype=torch.float64) / kernel.T
        ce.append(terms.ce.sum(-1, dtype=torch.float64))
        counts.append(kernel.counts(t, lengths).ce)
    return nats, torch.stack(ce, -1), torch.stack(counts, -1)
