"""Procedural memory: of each layer of each column, r slots of a key, a value and a strength, committed once per span.

Source: alxdofficial/neuromorphic on GitHub, commit 8431ccb9; what differs from it is said where it differs.
Notation: N rows, P tokens, B columns, L layers, H the width of a column, r slots; instances are layers times columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from pipeline.systems.neuromorphic.columns import ColumnFeedForward, ColumnLinear, unit
from pipeline.systems.neuromorphic.config import NeuromorphicConfig
from pipeline.systems.neuromorphic.memory.centred import centred
from pipeline.systems.neuromorphic.memory.neuromodulators import ProceduralNeuromodulator
from pipeline.systems.neuromorphic.memory.resets import distinct_rows
from pipeline.systems.neuromorphic.state import ProceduralState

STRONGEST, BUDGET, FULL = 3.0, 4.0, 0.9
"""Of a slot, and of all slots of an instance; above FULL of the budget strengths are penalised."""
ROUTING_TEMPERATURE = 0.02
"""Of the softmax that sends a token to slots by the cosine of its key with theirs: the best slot gets nearly all."""
USE = 0.5
"""What a unit of strength takes from a slot's score, when tokens are routed and when slots are committed."""


class ProceduralMemory(nn.Module):
    """The procedural memories of all layers and columns.

    Changed against the prototype: a token's eligibility goes to the slots whose keys match its own (there: to all
    slots alike, so that all slots became one), m is of a slot and not the slots' mean, and a slot's old rows count by
    its strength up to 1 (there: the random rows of an empty slot counted like learned ones).
    """

    initial_keys: Tensor
    initial_values: Tensor

    def __init__(self, config: NeuromorphicConfig) -> None:
        super().__init__()
        sizes = config.sizes
        self.config = config
        self.layers, self.columns, width = sizes.layers, sizes.columns, sizes.column_width
        instances = self.layers * self.columns
        self.key = ColumnLinear(instances, width, width)
        self.value = ColumnLinear(instances, width, width)
        self.readout = nn.ModuleList([ColumnFeedForward(self.columns, width) for _ in range(self.layers)])
        self.neuromodulator = ProceduralNeuromodulator(instances, width, sizes.slots)
        shape = (self.layers, self.columns, sizes.slots, width)
        self.register_buffer("initial_keys", distinct_rows("procedural.keys", shape), persistent=False)
        self.register_buffer("initial_values", distinct_rows("procedural.values", shape), persistent=False)

    def initial_state(self, rows: int, dtype: torch.dtype = torch.float32) -> ProceduralState:
        """Of `rows` streams that have learned nothing: distinct rows of strength 0."""
        keys, values = (initial.expand(rows, *initial.shape) for initial in self.initial_rows(dtype))
        strengths = keys.new_zeros(keys.shape[:-1])
        return ProceduralState(keys, values, strengths, torch.zeros_like(keys), torch.zeros_like(keys))

    def initial_rows(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [L, B, r, H] of an empty memory: unit rows."""
        return unit(self.initial_keys.to(dtype)), unit(self.initial_values.to(dtype))

    def read(self, layer: int, x: Tensor, state: ProceduralState, alive: Tensor) -> Tensor:
        """y = sum_i a_i (K_i . x^) V_i, then y + FFN(LN(y)).

        x [B, N, P, H] the layer's input; alive [N, P] bool: where false, y is 0 before its read-out. Returns
        [B, N, P, H] in x's dtype.
        """
        keys, values, strengths = (
            rearrange(rows[:, layer].to(x.dtype), "n b ... -> b n ...")
            for rows in (state.keys, state.values, state.strengths)
        )
        scores = unit(x) @ keys.transpose(-1, -2)
        weights = scores * strengths.unsqueeze(-2) * alive.to(x.dtype).unsqueeze(-1)
        return self.readout[layer](weights @ values)

    def eligibility(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], gate: Tensor, counted: Tensor, state: ProceduralState
    ) -> ProceduralState:
        """The state with eligibility after the tokens of a span.

        e_K = rho^P e_K + sum_t rho^(P-1-t) g_t w_t k_t, e_V likewise, with k_t = unit(W_k input_t), v_t = W_v (output_t
        - the mean over counted tokens) and w_t over slots: softmax((K_i . k_t - a_i / 2) / ROUTING_TEMPERATURE); if as
        published, 1 for all slots, and the mean stays. inputs, outputs: L of [B, N, P, H]; gate [N, P]: clamp(surprise
        / 5, 0, 1), 0 for tokens that do not count; counted [N, P] bool.
        """
        kept = state.keys.dtype
        keys = unit(self.key(_instances(inputs)).to(kept))
        said = _instances(outputs)
        values = self.value(said if self.config.as_published else centred(said, counted)).to(kept)
        tokens = gate.shape[1]
        rho = self.config.eligibility_decay
        ages = torch.arange(tokens - 1, -1, -1, device=gate.device, dtype=kept)
        weights = (gate.to(kept) * rho**ages).unsqueeze(-1)
        if self.config.as_published:
            weights = weights.expand(keys.shape[0], -1, -1, state.keys.shape[3])
        else:
            slots, strengths = _by_instance(state.keys), _by_instance(state.strengths)
            logits = keys @ slots.transpose(-1, -2) - USE * strengths.unsqueeze(-2)
            weights = weights * torch.softmax(logits / ROUTING_TEMPERATURE, -1)
        added = weights.transpose(-1, -2)
        return dataclasses.replace(
            state,
            eligible_keys=rho**tokens * state.eligible_keys + self._by_row(added @ keys),
            eligible_values=rho**tokens * state.eligible_values + self._by_row(added @ values),
        )

    def commit(self, state: ProceduralState, surprise: Tensor) -> tuple[ProceduralState, dict[str, Tensor]]:
        """What is eligible enters the slots at the end of a span. surprise [N]: mean nats of the span.

        a <- decay a; p, lambda, g, l, tau of the neuromodulator; w = softmax((K_i . e^_i - a_i / 2 + l_i) / tau);
        m_i = n_i / (n_i + 1) of the detached norm n_i of e_K,i; alpha = w g p m; a <- a (1 - p (1 - lambda));
        K_i <- unit of (1 - alpha) min(a_i, 1) K_i + alpha e^_K,i, V_i likewise; a <- clamp(a + alpha, 0, 3), rescaled
        to a sum of 4 if above; e <- (1 - p) e. Returns the state and detached measures, each [L, B].
        """
        eligible_keys, eligible_values = _by_instance(state.eligible_keys), _by_instance(state.eligible_values)
        keys, values = _by_instance(state.keys), _by_instance(state.values)
        strengths = self.config.decay * _by_instance(state.strengths)
        norms = eligible_keys.square().sum(-1).add(1e-16).sqrt()
        scalars = torch.stack(
            [norms.mean(-1), strengths.sum(-1) / BUDGET, surprise.to(keys.dtype).expand(norms.shape[:-1])], -1
        )
        p, retention, gain, routing, temperature = self.neuromodulator.controls(scalars, eligible_keys.mean(-2))
        new_keys, new_values = unit(eligible_keys), unit(eligible_values)
        logits = (keys * new_keys).sum(-1) - USE * strengths + routing
        w = torch.softmax(logits / temperature.unsqueeze(-1), -1)
        amount = norms.detach() / (norms.detach() + 1)
        alpha = w * (gain * p).unsqueeze(-1) * amount
        strengths = strengths * (1 - p * (1 - retention)).unsqueeze(-1)
        old = (1 - alpha) * strengths.clamp(max=1)
        added = (strengths + alpha).clamp(0, STRONGEST)
        total = added.sum(-1, keepdim=True)
        committed = ProceduralState(
            keys=self._by_row(_blend(keys, new_keys, old, alpha)),
            values=self._by_row(_blend(values, new_values, old, alpha)),
            strengths=self._by_row(added * (BUDGET / total.clamp(min=BUDGET))),
            eligible_keys=self._by_row((1 - p)[..., None, None] * eligible_keys),
            eligible_values=self._by_row((1 - p)[..., None, None] * eligible_values),
        )
        by_instance = {
            "commit_rate": p, "gain": gain, "retention": retention, "temperature": temperature,
            "written": alpha.sum(-1),
        }  # fmt: skip
        return committed, {
            name: rearrange(value.detach().mean(-1), "(l b) -> l b", l=self.layers)
            for name, value in by_instance.items()
        }

    def penalty(self, state: ProceduralState) -> Tensor:
        """Scalar: of the mean over rows of what the strengths exceed .9 of their budget by, summed over instances.

        Of strengths that are scaled to their budget, as published: constant, without gradient, where that is reached.
        """
        return torch.relu(state.strengths.sum(-1) - FULL * BUDGET).mean(0).sum()

    def summary(self, state: ProceduralState) -> Tensor:
        """[N, H]: the strength-weighted mean of the values, averaged over layers and columns; 0 of an empty memory."""
        strengths = state.strengths.unsqueeze(-1)
        means = (strengths * state.values).sum(-2) / strengths.sum(-2).clamp(min=1e-8)
        return means.mean((1, 2))

    def statistics(self, state: ProceduralState) -> dict[str, Tensor]:
        """Detached, each [L, B], means over rows: of the strengths, and the norm of what is eligible."""
        strengths = state.strengths.detach()
        norms = state.eligible_keys.detach().norm(dim=-1)
        values = {
            "a_mean": strengths.mean(-1), "a_max": strengths.amax(-1), "a_sum": strengths.sum(-1),
            "nonzero": (strengths > 0).to(strengths.dtype).mean(-1), "elig_norm": norms.mean(-1),
        }  # fmt: skip
        return {name: value.mean(0) for name, value in values.items()}

    def _by_row(self, x: Tensor) -> Tensor:
        return rearrange(x, "(l b) n ... -> n l b ...", l=self.layers)


def _blend(rows: Tensor, new: Tensor, old: Tensor, alpha: Tensor) -> Tensor:
    """Unit rows of old * rows + alpha * new; `rows` where alpha is 0, to the bit."""
    share = (alpha / (old + alpha).clamp(min=1e-12)).unsqueeze(-1)
    return torch.where((alpha > 0).unsqueeze(-1), unit((1 - share) * rows + share * new), rows)


def _instances(layers: Sequence[Tensor]) -> Tensor:
    return rearrange(torch.stack(list(layers)), "l b n p h -> (l b) n p h")


def _by_instance(x: Tensor) -> Tensor:
    return rearrange(x, "n l b ... -> (l b) n ...")
