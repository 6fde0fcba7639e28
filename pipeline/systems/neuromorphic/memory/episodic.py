"""Episodic memory: of each column, M episodes of a key, a value and a strength; a few tokens of a span become episodes.

Source: alxdofficial/neuromorphic on GitHub, commit 8431ccb9; what differs from it is said where it differs.
Notation: N rows, P tokens, B columns, D width, H the width of a column, M episodes of width E, C candidates.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from pipeline.systems.neuromorphic.columns import ColumnFeedForward, ColumnLinear, SharedColumnLinear, unit
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.memory.candidates import Candidates
from pipeline.systems.neuromorphic.memory.centred import centred
from pipeline.systems.neuromorphic.memory.neuromodulators import EpisodicNeuromodulator
from pipeline.systems.neuromorphic.memory.slots import chosen_slots, written
from pipeline.systems.neuromorphic.state import EpisodicState

STRONGEST, BUDGET, FULL = 3.0, 8.0, 0.9


class EpisodicMemory(nn.Module):
    """The episodic memories of all columns.

    Changed against the prototype: a candidate is written to one slot, and all of a span at once (there: each smeared
    over all slots, one after the other); strengths are in the retrieval's logits; novelty compares surprise / (surprise
    + ln vocabulary) and 1 - cosine, both 0 to 1; cosines enter the logits times sqrt(E), as products of vectors of unit
    variance do; values are without what all tokens of the span have in common; an episode that a new one replaces
    leaves nothing, also where it has the same key, and only its strength adds up (there: a running mean, in which what
    was told first outweighs what is told now).
    """

    def __init__(self, config: NeuromorphicConfig) -> None:
        super().__init__()
        sizes = config.sizes
        columns, width = sizes.columns, sizes.episodic_width
        self.config, self.columns, self.width = config, columns, width
        self.episodes, self.retrieved, self.most = sizes.episodes, sizes.retrieved, sizes.candidates
        self.query = SharedColumnLinear(columns, 2 * sizes.width, width)
        self.key = SharedColumnLinear(columns, 2 * sizes.width, width)
        self.novelty = SharedColumnLinear(columns, 2 * sizes.width, 1)
        self.context = SharedColumnLinear(columns, sizes.width, width)
        self.value = ColumnLinear(columns, sizes.column_width, width)
        self.readout = ColumnFeedForward(columns, width)
        self.output = ColumnLinear(columns, width, sizes.width)
        self.neuromodulator = EpisodicNeuromodulator(columns, width)

    def initial_state(
        self, rows: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> EpisodicState:
        """Of `rows` streams without episodes: rows of zeros until they are written."""
        keys = torch.zeros(rows, self.columns, self.episodes, self.width, dtype=dtype, device=device)
        return EpisodicState(keys, torch.zeros_like(keys), torch.zeros_like(keys[..., 0]))

    def read(self, x: Tensor, y_wm: Tensor, state: EpisodicState, alive: Tensor) -> Tensor:
        """What the episodes that match [x ; y_wm] best say, of each column.

        Of the `retrieved` episodes j with the highest sqrt(E) q . K_j + ln S_j: softmax of that + W_c x . V_j / sqrt(E)
        over their values, then y + FFN(LN(y)) and W_o. x, y_wm [N, P, D]; alive [N, P] bool: where false, no
        episode is read. Returns [B, N, P, D] in x's dtype.
        """
        scale = math.sqrt(self.width)
        queries = unit(self.query(torch.cat([x, y_wm], -1)))
        keys, values = (rearrange(rows.to(x.dtype), "n b m e -> b n m e") for rows in (state.keys, state.values))
        strengths = rearrange(state.strengths, "n b m -> b n 1 m")
        there = strengths > 0
        log_strengths = torch.where(there, strengths, torch.ones_like(strengths)).log().to(x.dtype)
        matches = scale * (queries @ keys.transpose(-1, -2)) + log_strengths
        least = torch.finfo(x.dtype).min
        with torch.no_grad():
            present = matches.masked_fill(~there, least)
            # By place and not by value: in bfloat16 several may be as high as the last of them.
            best = present.topk(min(self.retrieved, self.episodes), dim=-1).indices
            read = torch.zeros_like(present, dtype=torch.bool).scatter(-1, best, True) & there
        logits = matches + self.context(x) @ values.transpose(-1, -2) / scale
        weights = torch.softmax(logits.masked_fill(~read, least), -1)
        weights = weights * (read & alive[:, :, None]).to(x.dtype)
        return self.output(self.readout(weights @ values))

    def candidates(
        self, x: Tensor, y_wm: Tensor, outputs: Tensor, surprise: Tensor, valid: Tensor, state: EpisodicState
    ) -> Candidates:
        """The C tokens of a span that are most novel to each column.

        k = unit(W_k [x ; y_wm]), v = W_v (output - the mean over valid tokens), as published W_v output. Novelty
        w s / (s + ln vocabulary) + (1 - w) (1 - the highest cosine with an episode), w = sigmoid(W_nov [x ; y_wm]);
        without episodes the first term alone, w = 1. x, y_wm [N, P, D]; outputs [B, N, P, H] of the last layer;
        surprise [N, P] nats of predicting the next token; valid [N, P] bool: tokens that may become episodes. Cosines
        enter novelty without gradient.
        """
        kept = state.keys.dtype
        both = torch.cat([x, y_wm], -1)
        keys = unit(self.key(both).to(kept))
        weight = torch.sigmoid(self.novelty(both).squeeze(-1).to(kept))
        with torch.no_grad():
            there = rearrange(state.strengths > 0, "n b m -> b n 1 m")
            cosines = keys @ rearrange(state.keys, "n b m e -> b n e m")
            nearest = cosines.masked_fill(~there, 0).amax(-1).clamp(0, 1)
            some = there.any(-1)
        s = surprise.detach().to(kept)
        surprising = s / (s + math.log(self.config.vocab))
        novelty = torch.where(some, weight * surprising + (1 - weight) * (1 - nearest), surprising)
        counted = valid.to(kept)
        count = counted.sum(-1).clamp(min=1)
        with torch.no_grad():
            ranked = novelty.masked_fill(~valid, -1).sort(dim=-1, descending=True, stable=True).indices
            positions = ranked[..., : self.most]
        rows = positions.unsqueeze(-1)
        if not self.config.as_published:
            outputs = centred(outputs, valid)
        chosen_outputs = outputs.gather(2, rows.expand(-1, -1, -1, outputs.shape[-1]))
        return Candidates(
            keys=rearrange(keys.gather(2, rows.expand(-1, -1, -1, self.width)), "b n c e -> n b c e"),
            values=rearrange(self.value(chosen_outputs).to(kept), "b n c e -> n b c e"),
            novelty=rearrange(novelty.gather(2, positions), "b n c -> n b c"),
            valid=rearrange(valid.expand(self.columns, -1, -1).gather(2, positions), "b n c -> n b c"),
            positions=rearrange(positions, "b n c -> n b c"),
            mean_key=rearrange((keys * counted.unsqueeze(-1)).sum(-2) / count.unsqueeze(-1), "b n e -> n b e"),
            mean_novelty=rearrange((novelty * counted).sum(-1) / count, "b n -> n b"),
        )

    def write(
        self, candidates: Candidates, state: EpisodicState, surprise: Tensor
    ) -> tuple[EpisodicState, dict[str, Tensor]]:
        """The candidates become episodes at the end of a span. surprise [N]: mean nats of the span.

        g, tau, ww, decay of the neuromodulator; each candidate goes to one slot (`chosen_slots`) with alpha = g: K = k,
        V = v, and S <- S + alpha novelty where it matches the episode there, else S = alpha novelty. Then S <- decay
        clamp(S, 0, 3), rescaled to a sum of 8 if above. Returns the state and detached measures, each [B].
        """
        scalars = torch.stack(
            [
                surprise.to(state.keys.dtype).unsqueeze(-1).expand_as(candidates.mean_novelty),
                state.strengths.sum(-1) / BUDGET,
                candidates.mean_novelty,
            ],
            -1,
        )
        controls = self.neuromodulator.controls(
            rearrange(scalars, "n b s -> b n s"), rearrange(candidates.mean_key, "n b e -> b n e")
        )
        gain, temperature, aversion, decay = (rearrange(value, "b n -> n b 1") for value in controls)
        slots = chosen_slots(candidates, state, gain, temperature, aversion)
        after = written(candidates, slots, state, gain)
        strengths = decay * after.strengths.clamp(0, STRONGEST)
        total = strengths.sum(-1, keepdim=True)
        after = EpisodicState(after.keys, after.values, strengths * (BUDGET / total.clamp(min=BUDGET)))
        measures = {
            "novelty": candidates.mean_novelty, "gain": gain, "decay": decay, "temperature": temperature,
            "aversion": aversion, "written": slots.written.to(gain.dtype).sum(-1),
            "matched": slots.matched.to(gain.dtype).sum(-1),
        }  # fmt: skip
        return after, {
            name: value.detach().reshape(value.shape[0], self.columns).mean(0) for name, value in measures.items()
        }

    def penalty(self, state: EpisodicState) -> Tensor:
        """Scalar: of the mean over rows of what the strengths exceed .9 of their budget by, summed over columns.

        Of strengths that are scaled to their budget, as published: constant, without gradient, where that is reached.
        """
        return torch.relu(state.strengths.sum(-1) - FULL * BUDGET).mean(0).sum()

    def summary(self, state: EpisodicState) -> Tensor:
        """[N, E]: the strength-weighted mean of the values, averaged over columns; 0 of an empty memory."""
        strengths = state.strengths.unsqueeze(-1)
        means = (strengths * state.values).sum(-2) / strengths.sum(-2).clamp(min=1e-8)
        return means.mean(1)

    def statistics(self, state: EpisodicState) -> dict[str, Tensor]:
        """Detached, each [B], means over rows: of the strengths."""
        strengths = state.strengths.detach()
        values = {
            "S_mean": strengths.mean(-1), "S_max": strengths.amax(-1), "S_sum": strengths.sum(-1),
            "nonzero": (strengths > 0).to(strengths.dtype).mean(-1),
        }  # fmt: skip
        return {name: value.mean(0) for name, value in values.items()}
