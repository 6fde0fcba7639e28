"""The denoiser that no model can beat: the exact posterior of the residues under the process of `data synth mimir`."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.systems.mimir.data.process import COMPOSITION, RESIDUES, Process
from pipeline.systems.mimir.diffusion.kernel import Kernel
from pipeline.systems.mimir.diffusion.schedule import kept
from pipeline.systems.mimir.peptides import INTERACTING


class ExactDenoiser:
    """p(x_0 | x_t, label, target) of each residue, in float64.

    Given where the motif stands, or that it does not, the residues are independent: the posterior is the mixture over
    the places, each weighed by its prior and by the likelihood of all noisy residues.
    """

    def __init__(self, process: Process, kernel: Kernel, letters: str) -> None:
        self.kernel, self.process, self.planted = kernel, process, process.settings.planted
        places = torch.tensor([letters.index(letter) for letter in RESIDUES])
        self.composition = torch.zeros(len(letters), dtype=torch.float64)
        self.composition[places] = torch.from_numpy(COMPOSITION)
        self.motifs = torch.tensor([[letters.index(letter) for letter in motif] for motif in process.motifs])
        self.kept = kept(kernel.T)

    def __call__(self, xt: Tensor, t: Tensor, lengths: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Logits [rows, L, K] of xt [rows, L] at t [rows], given lengths, labels and targets of the process [rows];
        a target of -1 is that of background."""
        likelihood = self._likelihood(xt, t)  # of each letter, [rows, L, K]
        free = self.composition * likelihood
        evidence = free.sum(-1)
        inside = torch.arange(xt.shape[1]) < lengths[:, None]
        has_motif = (labels == INTERACTING) & (targets >= 0)
        motifs = self.motifs[targets.clamp(min=0)]
        size = motifs.shape[1]
        count = torch.tensor([self.process.places(length) for length in lengths.tolist()])
        nowhere = 1.0 - self.planted * has_motif
        total = nowhere.double()
        free_of_motif = torch.zeros_like(evidence)
        of_motif = torch.zeros_like(free)
        for start in range(xt.shape[1] - size + 1):
            ratio = self.planted / count.double() * has_motif * (start < count)
            for offset in range(size):
                place = start + offset
                ratio = ratio * likelihood[:, place].gather(-1, motifs[:, offset, None])[:, 0] / evidence[:, place]
            total = total + ratio
            free_of_motif[:, start : start + size] -= ratio[:, None]
            for offset in range(size):
                of_motif[:, start + offset].scatter_add_(-1, motifs[:, offset, None], ratio[:, None])
        free_of_motif += total[:, None]
        found = (free_of_motif[..., None] * free / evidence[..., None] + of_motif) / total[:, None, None]
        return torch.where(inside[..., None], found, 1.0).clamp(min=1e-30).log()

    def _likelihood(self, xt: Tensor, t: Tensor) -> Tensor:
        """p(x_t | x_0) for each letter x_0, [rows, L, K]."""
        letters = len(self.composition)
        if self.kernel.states > letters:
            known = torch.nn.functional.one_hot(xt.clamp(max=letters - 1), letters).double()
            return torch.where((xt == letters)[..., None], 1.0, known)
        kept_t = self.kept[t][:, None, None]
        return kept_t * torch.nn.functional.one_hot(xt, letters).double() + (1 - kept_t) / letters
