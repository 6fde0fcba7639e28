"""Noise by which residues are masked, a known number of them at each timestep.

At timestep t ceil(t L / T) of a peptide's L residues are MASK, at random positions. Going back, as many are revealed as
the step's number falls, at random positions, each drawn from the denoiser's prediction. With T at least L no step
reveals more than one residue, and the bound is that of autoregression in a random order: the sum over m = 1..L of the
mean cross-entropy of m masked residues (Hoogeboom et al. 2022, Autoregressive diffusion models, arXiv:2110.02037). It
has no prior term.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.systems.mimir.diffusion.kernel import Counts, Kernel, Terms, inside, predicted
from pipeline.systems.mimir.diffusion.noise import categorical, uniforms


class AbsorbingKernel(Kernel):
    """The masked residues of a peptide count in the loss; MASK is state K.

    mask_weight: the exponent with which the masked share of a peptide, m / L, is the weight of its cross-entropy. The
    cross-entropy is a weighted mean, so that an exponent moves emphasis to heavily masked peptides and leaves the scale
    as it is.
    """

    def __init__(self, T: int, K: int, mask_weight: float = 0.0) -> None:
        super().__init__(T, K)
        self.states = K + 1
        self.mask_weight = mask_weight

    def masked(self, t: Tensor, lengths: Tensor) -> Tensor:
        """How many residues are masked at timesteps t of peptides of these lengths: ceil(t L / T), [rows] int64."""
        return (t * lengths + self.T - 1) // self.T

    def corrupt(self, x0: Tensor, t: Tensor, lengths: Tensor, seed: int, domain: str, draw: Tensor) -> Tensor:
        active = inside(lengths, x0.shape[1])
        u = uniforms(seed, f"{domain}/corrupt", self.draw_of_step(draw, t), x0.shape[1])[..., 0]
        hidden = _first(u.masked_fill(~active, torch.inf), self.masked(t, lengths))
        return torch.where(hidden, self.K, x0 * active)

    def terms(self, logits: Tensor, x0: Tensor, xt: Tensor, t: Tensor, lengths: Tensor) -> Terms:
        mask = (xt == self.K) & inside(lengths, x0.shape[1])
        ce = -predicted(logits).gather(-1, x0[..., None])[..., 0]
        ce = ce.masked_fill(~mask, 0)
        weight, revealed = self._weight(t, lengths).to(ce), self._revealed(t, lengths).to(ce)
        return Terms(ce * weight[:, None], ce * revealed[:, None], mask)

    def counts(self, t: Tensor, lengths: Tensor) -> Counts:
        return Counts(self._weight(t, lengths) * self.masked(t, lengths), lengths.to(torch.float64))

    def _weight(self, t: Tensor, lengths: Tensor) -> Tensor:
        return (self.masked(t, lengths) / lengths.clamp(min=1).to(torch.float64)) ** self.mask_weight

    def _revealed(self, t: Tensor, lengths: Tensor) -> Tensor:
        """T times the share of the masked residues that is revealed in a step, [rows] float64.

        Peptides shorter than T have the same number of masks at several timesteps. Which of these reveals is free, so
        the share is spread evenly over them: the bound is the same and its estimate from one timestep varies less.
        """
        m, lengths = self.masked(t, lengths).clamp(min=1), lengths.clamp(min=1)
        before, last = (m - 1) * self.T // lengths, (m * self.T // lengths).clamp(max=self.T)
        return self.T * (m - self.masked(before, lengths)) / ((last - before) * m).to(torch.float64)

    def prior_bound(self, x0: Tensor, lengths: Tensor) -> Tensor:
        return torch.zeros(x0.shape, dtype=torch.float32, device=x0.device)

    def start(self, lengths: Tensor, width: int, seed: int, domain: str, draw: Tensor) -> Tensor:
        return inside(lengths, width) * self.K

    def reverse(self, logits: Tensor, xt: Tensor, t: Tensor, s: Tensor, lengths: Tensor) -> Tensor:
        """The probabilities of each position by itself, with as many positions masked after the step, on average, as
        timestep s has; `step` keeps to that number exactly."""
        p = predicted(logits).exp()
        active = inside(lengths, xt.shape[1])
        mask = (xt == self.K) & active
        stays = (self.masked(s, lengths) / mask.sum(-1).clamp(min=1)).clamp(max=1).to(p)[:, None, None]
        hidden = torch.cat([p * (1 - stays), stays.expand(*p.shape[:2], 1)], -1)
        known = torch.nn.functional.one_hot(xt * active, self.states).to(p)
        return torch.where(mask[..., None], hidden, known)

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
        order: Literal["random", "confidence"] = "random",
        sure: Tensor | None = None,
    ) -> Tensor:
        """x_s, with exactly as many masks as timestep s has. order "confidence" reveals where the most probable letter
        is the most probable by the logits `sure` (None: those that letters are drawn of), and draws the letter there
        all the same: an order that depends on what is visible alone leaves the distribution of a perfect denoiser as it
        is, if one residue is revealed at a time."""
        p = predicted(logits).exp()
        mask = (xt == self.K) & inside(lengths, xt.shape[1])
        u = uniforms(seed, f"{domain}/step", self.draw_of_step(draw, t), xt.shape[1], 2)
        key = u[..., 1] if order == "random" else -predicted(logits if sure is None else sure).amax(-1).double()
        revealed = (mask.sum(-1) - self.masked(s, lengths)).clamp(min=0)
        shown = _first(key.masked_fill(~mask, torch.inf), revealed)
        return torch.where(shown, categorical(p, u[..., 0]), xt)

    def cross_entropy_floors(self, frequencies: Tensor) -> Tensor:
        entropy = torch.special.entr(frequencies).sum(-1)
        return entropy.expand(self.T, *entropy.shape)


def _first(key: Tensor, count: Tensor) -> Tensor:
    """The count [rows] positions of the lowest key [rows, L], of equal keys the first ones: [rows, L] bool."""
    rank = key.argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < count[:, None]
