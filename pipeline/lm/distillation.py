"""Which tokens of packed rows a student with a window is compared with its full-attention teacher on."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 2**62 - 1
_GOLDEN = 0x1E3779B97F4A7C15
"""The golden ratio's bits, as in splitmix64 (Steele, Lea and Flood, 2014), in 62 bits."""


def reach_in_step(segment_ids: Tensor) -> Tensor:
    """Tokens that full attention sees at each token, itself included, of segment_ids [rows, T]: those of its document
    in this sequence, as full attention does not cross a step. [rows, T] int64."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.zeros_like(index)
    begins[:, 1:] = torch.where(segment_ids[:, 1:] != segment_ids[:, :-1], index[:, 1:], 0)
    return index - begins.cummax(dim=1).values + 1


def comparable(segment_ids: Tensor, window: int, trained: int | None) -> Tensor:
    """[rows, T] bool: the teacher sees more than the window, and no more than the `trained` tokens that the backbone
    was trained at (None: any number)."""
    reach = reach_in_step(segment_ids)
    beyond = reach > window
    return beyond if trained is None else beyond & (reach <= trained)


def count_compared(eligible: Tensor, tokens: int) -> int:
    """How many tokens `choose` marks, of all rows; waits for the device."""
    each = eligible.sum(dim=1)
    return int((each.clamp(max=tokens) if tokens else each).sum())


def choose(eligible: Tensor, tokens: int, *, seed: int, step: int, streams: Tensor) -> Tensor:
    """`tokens` random ones of the eligible [rows, T] in every row, or all where there are fewer or `tokens` is 0.

    A function of the seed, the step, the row's global stream [rows] and the place in the sequence alone, so that it is
    the same on every rank and for every layout of ranks. Does not wait for the device. Returns [rows, T] bool.
    """
    length = eligible.shape[1]
    if tokens == 0 or tokens >= length:
        return eligible
    place = torch.arange(length, device=eligible.device)
    key = _mixed(_mixed(_mixed(_mixed(torch.full_like(place, seed)) + step) + streams[:, None]) + place)
    chosen = torch.where(eligible, key, -1).topk(tokens, dim=1).indices
    return torch.zeros_like(eligible).scatter_(1, chosen, True) & eligible


def places(chosen: Tensor, tokens: int, *, fixed: bool | None = None) -> tuple[Tensor, Tensor]:
    """Where the chosen tokens of a rank's part [rows, T / degree] are: indices into the flattened part in token order,
    and which of them count, [n] each.

    `fixed` (on a GPU, None): n is the same at every step, whatever was chosen, so that nothing waits for the device.
    Otherwise only those that count are listed.
    """
    length = chosen.shape[1]
    most = min(tokens, length) if tokens else length
    valid, index = torch.sort(chosen.to(torch.int8), dim=1, descending=True, stable=True)
    index = index[:, :most] + length * torch.arange(chosen.shape[0], device=chosen.device)[:, None]
    index, counted = index.flatten(), valid[:, :most].flatten().bool()
    if not (chosen.device.type != "cpu" if fixed is None else fixed):
        index, counted = index[counted], counted[counted]
    return index, counted


def _mixed(x: Tensor) -> Tensor:
    """A bijective hash of int64 numbers, cut to 62 bits: the finaliser of splitmix64, on wrapping multiplication."""
    x = (x + 1) * _GOLDEN
    for shift, factor in ((30, 0x3F58476D1CE4E5B9), (27, 0x14D049BB133111EB)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (x ^ ((x >> 31) & (2**33 - 1))) & _MASK
