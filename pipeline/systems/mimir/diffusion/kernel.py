"""What both noise kernels of a discrete diffusion are used by: how residues are corrupted and how that is undone.

A residue is a letter id 0..K-1. A kernel may have one state more, MASK, which is id K. Padding is no state: whatever
lies beyond a peptide's length is 0 in every tensor of ids, takes no noise and has no loss. Timesteps run from 1 (little
noise) to T (nothing left of the peptide); 0 is the peptide itself.

Source: Austin et al. 2021, Structured Denoising Diffusion Models in Discrete State-Spaces (D3PM), arXiv:2107.03006.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.systems.mimir.diffusion.noise import uniforms


@dataclass(frozen=True)
class Terms:
    """Losses of the positions of a batch, all [rows, L] and 0 where they do not count.

    ce (float32, nats): cross-entropy of the true residue under the denoiser's prediction, times the weight of the row
    (1 but for an absorbing kernel with a mask weight). vb (float32, nats): T times the KL divergence of step t, whose
    mean over residues and over t uniform in 1..T is the variational bound per residue without its prior term. mask
    (bool): the positions whose ce counts.

    Neither is divided by anything: the averages are `ce.sum() / counts.ce.sum()` and `vb.sum() / counts.vb.sum()`,
    with the `Counts` of the same rows.
    """

    ce: Tensor
    vb: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Counts:
    """What the sums of `Terms` are divided by, per row: [rows] float64. ce: the positions whose ce counts, times the
    row's weight. vb: the residues of the peptide. Both multiply with a weight of 0 or 1 of the row, as the terms do."""

    ce: Tensor
    vb: Tensor


class Kernel(ABC):
    """Noise over K letters in T steps.

    `T`: timesteps. `K`: letters. `states`: ids that a noisy position may have, K, or K + 1 with MASK as the last.
    Everything is computed on the device of the tensors given. Random numbers are functions of (seed, domain, draw,
    position) alone (see `noise.uniforms`); each method that draws adds its own name to the domain.
    """

    states: int

    def __init__(self, T: int, K: int) -> None:
        if T < 1 or K < 2:
            raise ValueError(f"a kernel of {T} timesteps over {K} letters: at least 1 and 2")
        self.T, self.K = T, K

    def timesteps(
        self, seed: int, domain: str, draw: Tensor, lengths: Tensor, progress: float | Tensor = 1.0
    ) -> Tensor:
        """A timestep for each row, [rows] int64, uniform in 1..int(1 + (T - 1) min(progress, 1)).

        progress is the share of the curriculum that is done, epochs over its epochs: one number, or [rows]; 1 or more
        after it or without one. draw and lengths are [rows] int64.
        """
        noisiest: int | Tensor
        if isinstance(progress, Tensor):
            noisiest = (1 + (self.T - 1) * progress.to(torch.float64).clamp(0, 1)).long()
        else:
            noisiest = int(1 + (self.T - 1) * min(max(progress, 0.0), 1.0))
        return 1 + (uniforms(seed, f"{domain}/timestep", draw, 1)[:, 0, 0] * noisiest).long()

    @abstractmethod
    def corrupt(self, x0: Tensor, t: Tensor, lengths: Tensor, seed: int, domain: str, draw: Tensor) -> Tensor:
        """x_t, [rows, L] int64 states, drawn from q(x_t | x_0). x0 [rows, L] letters; t, lengths, draw [rows]. A t of
        0 leaves the peptide as it is."""

    @abstractmethod
    def terms(self, logits: Tensor, x0: Tensor, xt: Tensor, t: Tensor, lengths: Tensor) -> Terms:
        """The losses of one noisy version of each peptide. logits [rows, L, K] of x_0's letters, of any floating
        dtype, computed with in float32 (float64 where they are float64); x0, xt [rows, L]; t in 1..T, lengths
        [rows]."""

    @abstractmethod
    def counts(self, t: Tensor, lengths: Tensor) -> Counts:
        """What the sums of the terms of these timesteps are divided by: known before the model has run."""

    @abstractmethod
    def prior_bound(self, x0: Tensor, lengths: Tensor) -> Tensor:
        """The prior term of the bound, KL(q(x_T | x_0) || start), [rows, L] float32 nats, 0 beyond the length. It does
        not depend on the model: the bound per residue is the average of vb plus that of this, over `Counts.vb`."""

    @abstractmethod
    def start(self, lengths: Tensor, width: int, seed: int, domain: str, draw: Tensor) -> Tensor:
        """x_T of new peptides, [rows, width] int64, without any peptide behind it."""

    @abstractmethod
    def reverse(self, logits: Tensor, xt: Tensor, t: Tensor, s: Tensor, lengths: Tensor) -> Tensor:
        """p(x_s | x_t), [rows, L, states], for 0 <= s < t, [rows]: the mixture, over x_0 as predicted, of the exact
        posteriors q(x_s | x_t, x_0). s below t - 1 skips steps. Sums to 1; beyond the length all of it is on id 0.
        float32 (float64 where the logits are)."""

    @abstractmethod
    def step(
        self,
        logits: Tensor,
        xt: Tensor,
        t: Tensor,
        s: Tensor,
        lengths: Tensor,
        seed: int,
        domain: str,
        draw: Tensor,
    ) -> Tensor:
        """x_s, [rows, L] int64, drawn from the reverse process; domain should name what tells this run of it from
        others, while t is told apart here."""

    @abstractmethod
    def cross_entropy_floor(self, frequencies: Tensor) -> Tensor:
        """The mean of ce, nats, of the best denoiser of independent residues with these frequencies, [..., K] float64
        that sum to 1: [...] float64. t is uniform in 1..T."""

    def draw_of_step(self, draw: Tensor, t: Tensor) -> Tensor:
        """A number of its own for each timestep of each draw, [rows]."""
        return draw * (self.T + 1) + t

    def level(self, t: Tensor) -> Tensor:
        """What the model is told of the time, [rows] float32: the timestep, 1..T."""
        return t.to(torch.float32)

    def ladder(self, steps: int) -> list[int]:
        """The timesteps of a sampler with this many steps, T first and 0 last, as evenly apart as whole numbers are:
        steps + 1 of them, or T + 1 where steps is T or more."""
        if steps < 1:
            raise ValueError(f"a sampler of {steps} steps: at least 1")
        steps = min(steps, self.T)
        return [(self.T * left + steps - 1) // steps for left in range(steps, -1, -1)]


def inside(lengths: Tensor, width: int) -> Tensor:
    """Which positions are residues, [rows, width] bool."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def predicted(logits: Tensor) -> Tensor:
    """log p(x_0 | x_t), in float32 whatever the model computes in, and in float64 where it does."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
