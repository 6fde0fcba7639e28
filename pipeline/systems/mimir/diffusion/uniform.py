"""Noise by which a residue may become any letter: D3PM with uniform transitions, in closed form.

With a_t = alpha_1 ... alpha_t (`schedule.kept`), a noisy letter x_t is x_0 with probability a_t and else drawn
uniformly from all K letters: Q_t[i, j] = a_t [i = j] + (1 - a_t) / K for the noise of steps 1..t. No matrix is ever
formed.

The reverse step is the mixture over the predicted x_0 of the exact posteriors,

    p(x_s = j | x_t) = sum_i p(x_0 = i | x_t) q(x_s = j | x_t, x_0 = i) = Q_(s,t)[j, x_t] sum_i w_i Q_s[i, j],
    w_i = p(x_0 = i | x_t) / Q_t[i, x_t].

Austin et al. (arXiv:2107.03006, equation 4) leave out the division, which counts the evidence of x_t twice where the
prediction is the true p(x_0 | x_t), that is what cross-entropy trains: their chain then is not the data's distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.systems.mimir.diffusion.kernel import Counts, Kernel, Terms, inside, predicted
from pipeline.systems.mimir.diffusion.noise import categorical, uniforms
from pipeline.systems.mimir.diffusion.schedule import kept, kept_per_step


class UniformKernel(Kernel):
    """Every residue is noised by itself; all residues of a peptide count in the loss."""

    def __init__(self, T: int, K: int) -> None:
        super().__init__(T, K)
        self.states = K
        self.kept = kept(T)
        """a_t, [T + 1] float64."""
        self._tables = {torch.device("cpu"): (self.kept, _term_table(T, K))}

    def corrupt(self, x0: Tensor, t: Tensor, lengths: Tensor, seed: int, domain: str, draw: Tensor) -> Tensor:
        u = uniforms(seed, f"{domain}/corrupt", self.draw_of_step(draw, t), x0.shape[1], 2)
        stays = u[..., 0] < self._on(x0.device)[0][t][:, None]
        return torch.where(stays, x0, (u[..., 1] * self.K).long()) * inside(lengths, x0.shape[1])

    def terms(self, logits: Tensor, x0: Tensor, xt: Tensor, t: Tensor, lengths: Tensor) -> Terms:
        log_p = predicted(logits)
        active = inside(lengths, x0.shape[1])
        ce = -log_p.gather(-1, x0[..., None])[..., 0]
        vb = self.T * self._divergence(log_p, ce, x0, xt, t)
        return Terms(ce.masked_fill(~active, 0), vb.masked_fill(~active, 0), active)

    def _divergence(self, log_p: Tensor, ce: Tensor, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_(t-1) | x_t, x_0) || p(x_(t-1) | x_t)), [rows, L]; at t = 1 the cross-entropy, which it then is.

        Q_(t-1,t)[j, x_t] is a factor of both distributions and cancels in their ratio. The posterior is the same for
        all letters but x_0 and x_t, so that the sum over letters is one sum of logarithms and two of its members.
        """
        table = self._on(log_p.device)[1][t].to(log_p.dtype)  # [rows, columns]
        left, spread, at_xt, elsewhere = (column[:, None, None] for column in table[:, :4].unbind(-1))
        w = log_p.exp() * torch.where(self._letters(xt.device) == xt[..., None], at_xt, elsewhere)
        log_s = (left * w + spread * w.sum(-1, keepdim=True)).log()
        cases = torch.where((x0 == xt)[..., None], table[:, None, 8:], table[:, None, 4:8])
        constant, every, more_at_x0, more_at_xt = cases.unbind(-1)  # [rows, L] each
        at_x0 = log_s.gather(-1, x0[..., None])[..., 0]
        at_xt = log_s.gather(-1, xt[..., None])[..., 0]
        kl = constant - every * log_s.sum(-1) - more_at_x0 * at_x0 - more_at_xt * at_xt
        return torch.where(t[:, None] == 1, ce, kl)

    def counts(self, t: Tensor, lengths: Tensor) -> Counts:
        residues = lengths.to(torch.float64)
        return Counts(residues, residues)

    def prior_bound(self, x0: Tensor, lengths: Tensor) -> Tensor:
        spread = (1 - self.kept[-1]) / self.K
        ends = torch.cat([(self.kept[-1] + spread)[None], spread.expand(self.K - 1)])
        each = float((ends * (ends * self.K).log()).sum())
        return inside(lengths, x0.shape[1]).to(torch.float32) * each

    def start(self, lengths: Tensor, width: int, seed: int, domain: str, draw: Tensor) -> Tensor:
        u = uniforms(seed, f"{domain}/start", draw, width)[..., 0]
        return (u * self.K).long() * inside(lengths, width)

    def reverse(self, logits: Tensor, xt: Tensor, t: Tensor, s: Tensor, lengths: Tensor) -> Tensor:
        p = predicted(logits).exp()
        kept, _ = self._on(xt.device)
        kept_s, kept_t = kept[s][:, None, None], kept[t][:, None, None]
        spread_s, spread_t = (1 - kept_s) / self.K, (1 - kept_t) / self.K
        kept_between = kept_t / kept_s
        spread_between = (1 - kept_between) / self.K
        at_xt = self._letters(xt.device) == xt[..., None]
        w = p / torch.where(at_xt, kept_t + spread_t, spread_t).to(p)
        mixed = kept_s.to(p) * w + spread_s.to(p) * w.sum(-1, keepdim=True)
        result = torch.where(at_xt, kept_between + spread_between, spread_between).to(p) * mixed
        return torch.where(inside(lengths, xt.shape[1])[..., None], result, (self._letters(xt.device) == 0).to(p))

    def step(
        self, logits: Tensor, xt: Tensor, t: Tensor, s: Tensor, lengths: Tensor, seed: int, domain: str, draw: Tensor
    ) -> Tensor:
        u = uniforms(seed, f"{domain}/step", self.draw_of_step(draw, t), xt.shape[1])[..., 0]
        return categorical(self.reverse(logits, xt, t, s, lengths), u)

    def cross_entropy_floors(self, frequencies: Tensor) -> Tensor:
        floors = []
        for kept_t in self.kept[1:]:
            noise = (1 - kept_t) / self.K
            joint = frequencies[..., :, None] * (kept_t * torch.eye(self.K, dtype=torch.float64) + noise)
            floors.append(torch.special.entr(joint).sum((-2, -1)) - torch.special.entr(joint.sum(-2)).sum(-1))
        return torch.stack(floors)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """a_t and the table of the terms. Copied to a device once: a copy in every step would wait for the model."""
        if device not in self._tables:
            kept_t, terms = self._tables[torch.device("cpu")]
            self._tables[device] = (kept_t.to(device), terms.to(device))
        return self._tables[device]

    def _letters(self, device: torch.device) -> Tensor:
        return torch.arange(self.K, device=device)


def _term_table(T: int, K: int) -> Tensor:
    """What the divergence of a step needs to know of t: [T + 1, 12] float64.

    Columns: a_(t-1); (1 - a_(t-1)) / K; 1 / Q_t[i, i]; 1 / Q_t[i, j]; then for x_t other than x_0 and for x_t = x_0
    each: the sum of q log(Q_(t-1)[x_0, j] / Q_t[x_0, x_t]) over j, the posterior q of any letter, and by how much that
    of x_0 and that of x_t exceed it. Rows 0 and 1 make all of it 0: at t = 1 the divergence is the cross-entropy, and
    the logarithms must then be of something above 0, whatever the prediction, for the sake of the gradient.
    """
    table = torch.zeros(T + 1, 12, dtype=torch.float64)
    table[:2, 1:4] = 1
    step, total = kept_per_step(T), kept(T)
    for t in range(2, T + 1):
        noise_step, noise_before, noise_total = ((1 - a) / K for a in (step[t], total[t - 1], total[t]))
        stay_step, stay_before, stay_total = step[t] + noise_step, total[t - 1] + noise_before, total[t] + noise_total
        table[t, 0], table[t, 1] = total[t - 1], noise_before
        table[t, 2], table[t, 3] = 1 / stay_total, 1 / noise_total
        other = noise_step * noise_before / noise_total
        at_x0, at_xt = noise_step * stay_before / noise_total, stay_step * noise_before / noise_total
        constant = at_x0 * (stay_before / noise_total).log() + (1 - at_x0) * (noise_before / noise_total).log()
        table[t, 4:8] = torch.stack([constant, other, at_x0 - other, at_xt - other])
        other = noise_step * noise_before / stay_total
        both = stay_step * stay_before / stay_total
        constant = both * (stay_before / stay_total).log() + (1 - both) * (noise_before / stay_total).log()
        table[t, 8:12] = torch.stack([constant, other, both - other, torch.zeros_like(both)])
    return table
