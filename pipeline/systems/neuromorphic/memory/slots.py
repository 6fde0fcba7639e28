"""Which slot of the episodic memory each candidate of a span goes to, and the write of all of them at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.systems.neuromorphic.memory.candidates import Candidates
from pipeline.systems.neuromorphic.state import EpisodicState

MATCH = 0.95
"""The cosine from which on a candidate is the same episode as one that is there."""


@dataclass(frozen=True)
class Slots:
    """Each [N, B, C]."""

    index: Tensor
    """int64."""
    written: Tensor
    """bool."""
    matched: Tensor
    """bool: written over the episode of nearly its key; else in place of another one."""
    weight: Tensor
    """1 where written, else 0; with the gradient of the softmax over slots."""


def chosen_slots(
    candidates: Candidates, state: EpisodicState, gain: Tensor, temperature: Tensor, aversion: Tensor
) -> Slots:
    """One slot per candidate: the episode of the highest cosine if that is at least MATCH, else the next weakest slot
    that no other candidate has, unless the episode there is stronger than the candidate's would be.

    The most novel candidate takes the weakest slot; of equally weak ones the first. gain, temperature, aversion [N, B,
    1]. The weight's gradient is that of softmax((K . k - aversion S) / temperature) at the slot (straight-through,
    arXiv 1308.3432). Keys of slots that hold nothing count as cosine 0.
    """
    there = state.strengths > 0
    cosines = (candidates.keys @ state.keys.transpose(-1, -2)).masked_fill(~there.unsqueeze(-2), 0)
    with torch.no_grad():
        nearest, nearest_slot = cosines.max(-1)
        matched = candidates.valid & (nearest >= MATCH)
        taken = torch.zeros_like(there).scatter_reduce(-1, nearest_slot, matched, "amax", include_self=True)
        weakness = state.strengths.masked_fill(taken, torch.inf)
        free = weakness.sort(dim=-1, stable=True)
        new = candidates.valid & ~matched
        rank = (new.long().cumsum(-1) - 1).clamp(0, free.indices.shape[-1] - 1)
        stronger = free.values.gather(-1, rank) >= gain * candidates.novelty
        distinct = new.long().cumsum(-1) <= free.indices.shape[-1]
        new = new & ~stronger & distinct
        index = torch.where(matched, nearest_slot, free.indices.gather(-1, rank))
    scores = (cosines - (aversion * state.strengths).unsqueeze(-2)) / temperature.unsqueeze(-1)
    soft = torch.softmax(scores, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    was_written = matched | new
    weight = was_written.to(soft.dtype) * (1 + soft - soft.detach())
    return Slots(index, was_written, matched, weight)


def written(candidates: Candidates, slots: Slots, state: EpisodicState, gain: Tensor) -> EpisodicState:
    """The state after the candidates have entered their slots: what writing them one after the other, in the order of
    their positions, gives. Strengths are not yet limited, nor decayed."""
    amount = slots.weight * gain * candidates.novelty
    same = slots.index.unsqueeze(-1) == slots.index.unsqueeze(-2)
    later = candidates.positions.unsqueeze(-2) > candidates.positions.unsqueeze(-1)
    last = slots.written & ~(same & later & slots.written.unsqueeze(-2)).any(-1)
    # A product with one-hot rows and not scatter_add, which on CUDA adds in any order.
    places = torch.arange(state.strengths.shape[-1], device=slots.index.device)
    one_hot = (slots.index.unsqueeze(-2) == places.unsqueeze(-1)).to(amount.dtype)
    of_last = one_hot * last.unsqueeze(-2)
    touched = of_last.sum(-1) > 0
    replaced = (one_hot @ (slots.written & ~slots.matched).to(amount.dtype).unsqueeze(-1)).squeeze(-1) > 0
    keys, values = of_last @ candidates.keys, of_last @ candidates.values
    strengths = state.strengths.masked_fill(replaced, 0) + (one_hot @ amount.unsqueeze(-1)).squeeze(-1)
    touched = touched.unsqueeze(-1)
    return EpisodicState(torch.where(touched, keys, state.keys), torch.where(touched, values, state.values), strengths)
